"""What a run's stored targets hold for a student of a given shape, counted before anything is loaded."""

from typing import TYPE_CHECKING

from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.losses.feature_spec import teacher_features

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target

# what `features = "auto"` is where it fits: four hidden states of the teacher, see auto_features.py
AUTO_FEATURES = "mse:even:4@10"


def features_to_store(config: TrainConfig, target: "Target") -> str:
    """Return the features that a run's targets are to hold for a student of the shape `target`."""
    if config.features != "auto":
        return config.features
    same_width = not target.checkpoint and target.config.hidden_size == target.teacher.hidden_size
    return AUTO_FEATURES if same_width and config.target_format == "hidden" else ""


def stored_states(config: RunConfig, target: "Target") -> int:
    """Return how many hidden states per token the targets hold besides the final one, at one byte a number."""
    text, layers = features_to_store(config.train, target), target.teacher.num_hidden_layers
    names = teacher_features(text, target.config.num_hidden_layers, layers)
    return sum(name.startswith("hidden-") for name in names)
