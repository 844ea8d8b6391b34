"""Choose which features of the teacher the student follows where that was left to the run, and make their losses."""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moe2dense.config.training import AUTO_FEATURES, TrainConfig
from moe2dense.distillation.checks import needs_teacher
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.targets.protocols import FeatureTargets, Targets
from moe2dense.errors import UserError
from moe2dense.losses.feature_match import FeatureMatch
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.modeling.kinds import BuiltStudent, language_model
from moe2dense.student.ffn.methods import built_from_teacher
from moe2dense.teacher.kinds import AnyTeacher


@dataclass(frozen=True)
class _TeacherSide:
    """The teacher's layers and hidden size, and the names of its features that can be had; None = any."""

    layers: int
    width: int
    features: frozenset[str] | None

    def missing(self, text: str, student_layers: int) -> str:
        """Return the first feature that `text` needs and that is not there; "" where all are."""
        if self.features is None:
            return ""
        if not self.features or not self.layers:
            return "any"
        names = teacher_features(text, student_layers, self.layers)
        return next((name for name in names if name not in self.features), "")


def _teacher_side(targets: Targets | None, teacher: AnyTeacher | None) -> _TeacherSide | None:
    """Return what can be had of the teacher's layers: from targets where there are any, else from the teacher."""
    if isinstance(targets, FeatureTargets):
        return _TeacherSide(targets.layers, targets.width, frozenset(targets.features))
    if targets is not None:
        return _TeacherSide(0, 0, frozenset())
    if teacher is None:
        return None
    config = teacher.config.get_text_config()
    return _TeacherSide(config.num_hidden_layers, config.hidden_size, None)


def settle_features(
    config: TrainConfig,
    student: BuiltStudent | PreTrainedModel,
    targets: Targets | None,
    teacher: AnyTeacher | None,
    regime: Regime | None,
) -> TrainConfig:
    """Return `config` with features "auto" or "auto-falling" replaced by those of AUTO_FEATURES or by none.

    They are replaced by features where the student was built of the teacher's own residual stream, at the same width, and the targets
    hold what is needed.
    """
    if config.features not in AUTO_FEATURES:
        return config
    chosen = AUTO_FEATURES[config.features]
    sizes = language_model(student).config.get_text_config()
    side = _teacher_side(targets, teacher)
    fits = (
        side is not None
        and isinstance(student, BuiltStudent)
        and built_from_teacher(student.method)
        and not (regime is not None and regime.brings_targets)
        and (targets is not None or needs_teacher(config))
        and side.width == sizes.hidden_size
        and not side.missing(chosen, sizes.num_hidden_layers)
    )
    return dataclasses.replace(config, features=chosen if fits else "")


def make_match(
    config: TrainConfig, model: PreTrainedModel, targets: Targets | None, teacher: AnyTeacher | None, seed: int
) -> FeatureMatch:
    """Make the feature losses that config.features asks for.

    Raises UserError when the targets do not hold what they need.
    """
    sizes, side = model.config.get_text_config(), _teacher_side(targets, teacher)
    if side is None:
        raise UserError("features need a teacher, or targets that hold its features")
    if missing := side.missing(config.features, sizes.num_hidden_layers):
        raise UserError(
            f"features {config.features!r} need targets that hold them, which these do not ({missing} is missing); "
            f"write the targets again with --features {config.features}"
        )
    torch.manual_seed(seed)
    student = (sizes.num_hidden_layers, sizes.hidden_size)
    match = FeatureMatch(config.features, student, (side.layers, side.width), sizes.num_attention_heads)
    return match.to(next(model.parameters()).dtype)
