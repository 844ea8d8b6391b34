"""From the name in train.regime to the regime, with the models it needs."""

from typing import TYPE_CHECKING, Any

from moe2dense.config.schedules import scheduled
from moe2dense.config.schema import RegimeConfig
from moe2dense.errors import UserError, nearest

if TYPE_CHECKING:
    from moe2dense.config.schema import RunConfig
    from moe2dense.distillation.regime import Regime

OWN_TEXT = ("on-policy", "policy-gradient")  # the student writes
TRAINED = (*OWN_TEXT, "online", "mutual", "ema", "multiview", "mtp")


def check_regime(name: str, options: RegimeConfig) -> None:
    """Raises UserError for a name that is no regime and for options outside their range."""
    if name and name not in TRAINED:
        raise UserError(
            f"train.regime {name!r} is unknown{nearest(name, list(TRAINED))}; use one of {', '.join(TRAINED)}"
        )
    for key, bounded in (("share", True), ("head_weight", False), ("trunk", True)):
        ends = [scheduled(getattr(options, key), step, 2) for step in (0, 1)]
        if min(ends) < 0 or (bounded and max(ends) > 1):
            found = getattr(options, key)
            raise UserError(
                f"regime.{key} must {'lie between 0 and 1' if bounded else 'not be negative'}; found {found!r}"
            )
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


def check_regime_settings(settings: "RunConfig") -> None:
    """As `check_regime`, and that the rest of a run's settings fits its regime. Raises UserError."""
    train, name = settings.train, settings.train.regime
    check_regime(name, settings.regime)
    if name == "policy-gradient":
        from moe2dense.distillation.regimes.policy_gradient import check_policy

        check_policy(train)
    if name and train.shard:
        raise UserError(f"train.shard spreads one model; the {name} regime runs on copies: leave one of them out")
    if not name or not brings_targets(name, settings.regime):
        return
    for key in ("select", "targets", "features", "token_weights"):
        if getattr(train, key) not in ("", "auto"):
            raise UserError(
                f"train.{key} belongs to the teacher's answers on fixed text, which the {name} regime does not use"
            )
    if train.temperature_schedule == "auto":
        raise UserError(f"--temperature auto is chosen on fixed text; give the {name} regime a number")


def make_regime(
    name: str, options: RegimeConfig | None = None, teacher: Any = None, peer: Any = None
) -> "Regime | None":
    """The regime called `name` for one run of `distill`; None for "".

    teacher: a Teacher or a transformers model (on-policy, policy-gradient, online); peer: the second student (mutual). Raises UserError for an
    unknown name, options outside their range, and a model that is missing.
    """
    options = options or RegimeConfig()
    check_regime(name, options)
    if name == "on-policy":
        from moe2dense.distillation.regimes.on_policy import OnPolicy

        return OnPolicy(teacher, options)
    if name == "policy-gradient":
        from moe2dense.distillation.regimes.policy_gradient import PolicyGradient

        return PolicyGradient(teacher, options)
    if name == "mtp":
        from moe2dense.distillation.regimes.mtp import MultiToken

        return MultiToken(options)
    if name == "multiview":
        from moe2dense.distillation.regimes.multiview import MultiView

        return MultiView(options)
    from moe2dense.distillation.regimes import peers

    if name == "ema":
        return peers.Ema(options)
    if name == "online":
        return peers.Online(trainable(teacher), options)
    if name == "mutual":
        if peer is None:
            raise UserError("the mutual regime needs a second student (peer)")
        return peers.Mutual(peer.model if hasattr(peer, "provenance") else peer, options)
    return None


def trainable(teacher: Any) -> Any:
    """The teacher as a transformers model in memory, which can learn. Raises UserError without one."""
    if teacher is None:
        raise UserError("the online regime trains the teacher too and needs it in memory: pass teacher=")
    if not hasattr(teacher, "run"):
        return teacher
    import torch
    from transformers import AutoModelForCausalLM

    from moe2dense.modeling.load import quiet

    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                teacher.path, dtype=torch.float32, experts_implementation="eager" if teacher.card else None
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the online regime cannot load {teacher.path} for training: {str(error).splitlines()[0]}"
        ) from error


def brings_targets(name: str, options: RegimeConfig) -> bool:
    """Whether a regime needs no targets of the fixed text."""
    from moe2dense.distillation.regimes.peers import always

    return name in (*OWN_TEXT, "online") or (name in ("mutual", "ema", "multiview") and always(options.share) == 1.0)
