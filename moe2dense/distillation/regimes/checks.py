"""Refuse options of a regime that are out of range, and settings of a run that its regime cannot be used with."""

from moe2dense.config.schedules import scheduled
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import RegimeConfig, TrainConfig
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.errors import UserError, nearest


def check_regime(name: str, options: RegimeConfig) -> None:
    """Raise UserError for a name that is no regime and for options outside their range."""
    if name and name not in REGIMES:
        raise UserError(
            f"train.regime {name!r} is unknown{nearest(name, list(REGIMES))}; use one of {', '.join(REGIMES)}"
        )
    for key, bounded in (("share", True), ("head_weight", False), ("trunk", True)):
        value = getattr(options, key)
        ends = [scheduled(value, step, 2) for step in (0, 1)]
        if min(ends) < 0 or (bounded and max(ends) > 1):
            bounds = "lie between 0 and 1" if bounded else "not be negative"
            raise UserError(f"regime.{key} must {bounds}; found {value!r}")
    for key, low, high in (("prompt", 0, 1), ("top_p", 0, None), ("dropout", None, 1), ("decay", None, 1)):
        value = getattr(options, key)
        if not (value > 0 if low is not None else value >= 0) or not (value < 1 if high is not None else value <= 1):
            raise UserError(f"regime.{key} must lie between 0 and 1; found {value:g}")
    for key in ("rollout_steps", "views", "heads"):
        if getattr(options, key) < 1:
            raise UserError(f"regime.{key} must be at least 1; found {getattr(options, key)}")
    if not 0 <= options.teacher_mix < 1:
        raise UserError(f"regime.teacher_mix must be at least 0 and below 1; found {options.teacher_mix:g}")
    if name == "policy-gradient" and options.sample_temperature == 0:
        raise UserError("regime.sample_temperature 0 draws nothing; the policy-gradient regime needs it above 0")
    for key in ("sample_temperature", "peer_lr", "ratio_clip"):
        if getattr(options, key) < 0:
            raise UserError(f"regime.{key} must not be negative; found {getattr(options, key):g}")


def check_regime_settings(settings: RunConfig) -> None:
    """Do `check_regime`, and check that the rest of a run's settings fits its regime. Raises UserError."""
    train, name = settings.train, settings.train.regime
    check_regime(name, settings.regime)
    if name == "policy-gradient":
        check_policy(train)
    if name and train.shard:
        raise UserError(f"train.shard spreads one model; the {name} regime runs on copies: leave one of them out")
    if not brings_targets(name, settings.regime):
        return
    for key in ("select", "targets", "features", "token_weights"):
        if getattr(train, key) not in ("", "auto"):
            raise UserError(
                f"train.{key} belongs to the teacher's answers on fixed text, which the {name} regime does not use"
            )
    if train.temperature_schedule == "auto":
        raise UserError(f"--temperature auto is chosen on fixed text; give the {name} regime a number")


def check_policy(train: TrainConfig) -> None:
    """Raise UserError for a loss that is not the sum of the policy-gradient regime's two terms."""
    if train.loss != "reverse_kl":
        raise UserError(
            f"the policy-gradient regime lowers reverse_kl; found train.loss {train.loss!r}: set it to that"
        )
    if train.temperature != 1.0 or train.temperature_schedule:
        raise UserError("the policy-gradient regime is of the student's own distribution; leave the temperature at 1")


def brings_targets(name: str, options: RegimeConfig) -> bool:
    """Return whether a regime needs no targets of the fixed text; False for ""."""
    if not name:
        return False
    targets = REGIMES[name].targets
    return targets == "own" or (targets == "mixed" and constant_value(options.share) == 1.0)


def constant_value(schedule: str) -> float | None:
    """Return the value of a schedule that never changes, else None."""
    first, last = (scheduled(schedule, step, 2) for step in (0, 1))
    return first if first == last and not schedule.startswith("step") else None
