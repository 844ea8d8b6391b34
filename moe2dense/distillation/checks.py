"""Refuse training settings that contradict each other or what is at hand."""

from moe2dense.config.schedules import scheduled
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.targets.formats import FORMATS
from moe2dense.distillation.targets.record import check_token_weights
from moe2dense.errors import UserError
from moe2dense.losses.feature_spec import parse_features
from moe2dense.losses.registry import parse_divergence


def check_training(config: TrainConfig) -> None:
    """Refuse settings that no run could follow, before anything is read. Raises UserError naming the setting."""
    parse_divergence(config.loss)
    if config.target_format not in FORMATS:
        raise UserError(f"train.target_format must be one of {', '.join(FORMATS)}; found {config.target_format!r}")
    if config.wanted_features:
        parse_features(config.features)
        scheduled(config.feature_weight, 0, 1)
    if config.token_weights:
        check_token_weights(config.token_weights)
    if config.temperature_schedule not in ("", "auto"):
        scheduled(config.temperature_schedule, 0, 1)
    if config.alpha_schedule:
        scheduled(config.alpha_schedule, 0, 1)
    if config.targets or config.target_format in ("hidden", "full"):
        return
    kept = f"train.target_format={config.target_format!r} keeps a part of the teacher's distribution"
    if config.loss != "forward_kl":
        raise UserError(f"{kept}, which serves forward_kl only, not loss {config.loss!r}; use hidden or full")
    if config.temperature_schedule:
        raise UserError(f"{kept} at one temperature, not {config.temperature_schedule!r}; use hidden or full")
    if config.wanted_features:
        raise UserError(f"{kept} and no features; use hidden")


def needs_teacher(config: TrainConfig) -> bool:
    """Whether hard labels are not all that is learnt."""
    return bool(config.alpha_schedule) or scheduled(config.alpha, 0, 1) < 1
