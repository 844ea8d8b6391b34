"""Choose which hidden states of the teacher the student follows where that was left to the run."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.checks import needs_teacher
from moe2dense.errors import UserError
from moe2dense.losses.feature_match import FeatureMatch
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.student.ffn.methods import built_from_teacher

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target


def kept_states(config: RunConfig, target: "Target") -> int:
    """Hidden states of the teacher's layers beside its last that the stored targets hold, one byte a number."""
    text, layers = features_to_store(config.train, target), target.teacher.num_hidden_layers
    names = teacher_features(text, target.config.num_hidden_layers, layers)
    return sum(name.startswith("hidden-") for name in names)


AUTO_FEATURES = "mse:even:4@10"


def settle_features(config: TrainConfig, student: Any, known: Any, teacher: Any, regime: Any) -> TrainConfig:
    """`config` with features "auto" settled: AUTO_FEATURES where the student was made of the teacher's own residual stream, at the same
    width, and the targets hold what is needed; none elsewhere."""
    if config.features != "auto":
        return config
    model = student.model if hasattr(student, "provenance") else student
    about, brought = model.config.get_text_config(), regime is not None and regime.brings_targets
    fits = not brought and built_from_teacher(getattr(student, "method", ""))
    if known is not None:
        layers, width = (getattr(known, name, 0) for name in ("layers", "width"))
        wanted = teacher_features(AUTO_FEATURES, about.num_hidden_layers, layers) if layers else ("any",)
        fits &= width == about.hidden_size and set(wanted) <= set(getattr(known, "features", ()))
    else:
        fits &= teacher is not None and needs_teacher(config)
        fits &= teacher is None or teacher.config.get_text_config().hidden_size == about.hidden_size
    return dataclasses.replace(config, features=AUTO_FEATURES if fits else "")


def features_to_store(config: TrainConfig, target: Any) -> str:
    """The features that a run's targets are to hold for a student of the shape `target` (student.target.Target)."""
    if config.features != "auto":
        return config.features
    same = not target.checkpoint and target.config.hidden_size == target.teacher.hidden_size
    return AUTO_FEATURES if same and config.target_format == "hidden" else ""


def make_match(config: TrainConfig, model: Any, targets: Any, teacher: Any, seed: int) -> FeatureMatch:
    """The feature losses that config.features asks for. Raises UserError when the targets do not hold what they need."""
    about = model.config.get_text_config()
    own = (about.num_hidden_layers, about.hidden_size)
    if targets is not None:
        whole = (getattr(targets, "layers", 0), getattr(targets, "width", 0))
        held = set(getattr(targets, "features", ()))
        missing = [n for n in teacher_features(config.features, own[0], whole[0]) if n not in held] if held else ["any"]
        if missing:
            raise UserError(
                f"features {config.features!r} need targets that hold them, which these do not ({missing[0]} is missing); "
                f"write the targets again with --features {config.features}"
            )
    elif teacher is not None:
        config_t = teacher.config.get_text_config()
        whole = (config_t.num_hidden_layers, config_t.hidden_size)
    else:
        raise UserError("features need a teacher, or targets that hold its features")
    torch.manual_seed(seed)
    match = FeatureMatch(config.features, own, whole, about.num_attention_heads)
    return match.to(next(model.parameters()).dtype)
