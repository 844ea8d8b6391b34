"""Refuse training settings that contradict each other, before anything is read."""

from moe2dense.config.schedules import scheduled
from moe2dense.config.training import OPTIMIZERS, WEIGHTS, TrainConfig
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.token_weights import check_token_weights
from moe2dense.errors import UserError, nearest
from moe2dense.losses.feature_spec import parse_features
from moe2dense.losses.registry import parse_divergence


def check_training(config: TrainConfig) -> None:
    """Refuse settings that no run could follow, before anything is read. Raises UserError naming the setting."""
    divergence, _ = parse_divergence(config.loss)
    if config.target_format not in TARGET_FORMATS:
        raise UserError(
            f"train.target_format must be one of {', '.join(TARGET_FORMATS)}; found {config.target_format!r}"
        )
    _check_optimizer(config)
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


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimiser, a precision or a schedule that there is not. Raises UserError naming the setting."""
    for name, known in (("optimizer", OPTIMIZERS), ("weights", WEIGHTS)):
        value = getattr(config, name)
        if value not in known:
            raise UserError(
                f"train.{name} must be one of {', '.join(known)}; found {value!r}{nearest(value, list(known))}"
            )
    plain = (config.weights, config.offload, config.step_in_backward) == ("float32", False, False)
    if config.optimizer == "muon" and (config.lora or config.shard):
        other = "--lora" if config.lora else "train.shard"
        raise UserError(
            f"train.optimizer = 'muon' takes whole matrices, which {other} does not leave; use adamw, or auto"
        )
    if config.optimizer == "muon" and not plain:
        raise UserError(
            "train.optimizer = 'muon' steps float32 weights with all gradients at hand; leave train.weights, offload and "
            "step_in_backward as they are with it, or use adamw"
        )
    if not 0 <= config.cooldown <= 1 - config.warmup:
        raise UserError(
            f"train.cooldown must lie between 0 and what train.warmup leaves (1 - {config.warmup:g}); found {config.cooldown:g}"
        )
    if config.shard and (not plain or config.optimizer not in ("auto", "adamw")):
        raise UserError(
            "train.shard spreads AdamW's states and float32 weights over processes; leave train.optimizer, weights, offload and "
            "step_in_backward as they are with it"
        )


def needs_teacher(config: TrainConfig) -> bool:
    """Return whether the student learns from more than hard labels."""
    return bool(config.alpha_schedule) or scheduled(config.alpha, 0, 1) < 1
