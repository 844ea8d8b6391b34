"""Refuse training settings that contradict each other, before anything is read."""

from moe2dense.config.schedules import scheduled
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.token_weights import check_token_weights
from moe2dense.errors import UserError
from moe2dense.losses.feature_spec import parse_features
from moe2dense.losses.registry import parse_divergence


def check_training(config: TrainConfig) -> None:
    """Refuse settings that no run could follow, before anything is read. Raises UserError naming the setting."""
    divergence, _ = parse_divergence(config.loss)
    if config.target_format not in TARGET_FORMATS:
        raise UserError(
            f"train.target_format must be one of {', '.join(TARGET_FORMATS)}; found {config.target_format!r}"
        )
    if config.optimizer == "muon" and (config.lora or config.shard):
        other = "--lora" if config.lora else "train.shard"
        raise UserError(
            f"train.optimizer = 'muon' takes whole matrices, which {other} does not leave; use adamw, or auto"
        )
    if config.wanted_features:
        parse_features(config.features)
        scheduled(config.feature_weight, 0, 1)
    if not 0 < config.call_weight < float("inf"):
        raise UserError(f"train.call_weight must be a number above 0; found {config.call_weight:g}")
    if config.token_weights:
        check_token_weights(config.token_weights)
    if config.temperature_schedule not in ("", "auto"):
        scheduled(config.temperature_schedule, 0, 1)
    if config.alpha_schedule:
        scheduled(config.alpha_schedule, 0, 1)
    if config.targets or TARGET_FORMATS[config.target_format].whole:
        return
    partial = f"train.target_format={config.target_format!r} keeps a part of the teacher's distribution"
    if config.target_format not in divergence.target_formats:
        raise UserError(f"{partial}, which serves forward_kl only, not loss {config.loss!r}; use hidden or full")
    if config.temperature_schedule:
        raise UserError(f"{partial} at one temperature, not {config.temperature_schedule!r}; use hidden or full")
    if config.wanted_features:
        raise UserError(f"{partial} and no features; use hidden")


def needs_teacher(config: TrainConfig) -> bool:
    """Return whether the student learns from more than hard labels."""
    return bool(config.alpha_schedule) or scheduled(config.alpha, 0, 1) < 1
