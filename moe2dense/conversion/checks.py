"""Refuse settings and text that a conversion could not use, before anything is computed."""

from typing import TYPE_CHECKING, Any

from moe2dense.config.schema import RunConfig
from moe2dense.conversion.job import Text
from moe2dense.distillation.regimes.registry import OWN_TEXT, brings_targets
from moe2dense.distillation.select_blocks import parse_selection
from moe2dense.errors import UserError, nearest
from moe2dense.generation.filters import parse_band
from moe2dense.generation.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_text_settings(settings: RunConfig) -> None:
    """Refuse settings of [write] and train.select that mean nothing. Raises UserError."""
    write = settings.write
    if not 0 <= write.share <= 1:
        raise UserError(f"write.share must lie between 0 and 1; found {write.share:g}")
    if write.share:
        Sampling(write.temperature, write.top_p, write.beams)
        parse_band(write.nll)
    if not 0 <= write.duplicates <= 1:
        raise UserError(f"write.duplicates must lie between 0 and 1; found {write.duplicates:g}")
    if parse_selection(settings.train.select) and brings_targets(settings.train.regime, settings.regime):
        raise UserError(
            f"train.select chooses by the teacher's targets of the text, which the {settings.train.regime} regime has none of; leave one out"
        )
    check_draws(settings)
    if settings.train.targets and (write.share or settings.train.select):
        raise UserError(
            "train.targets are of the data as it is; leave out write.share and train.select, or the targets"
        )


def check_draws(settings: RunConfig) -> None:
    """Raises UserError where several answers of a teacher with drawn experts cannot be averaged."""
    draws, train = settings.teacher.draws, settings.train
    if draws < 0:
        raise UserError(f"teacher.draws must not be negative; found {draws}")
    if draws < 2:
        return
    for name, found, plain in (
        ("regime", train.regime, train.regime not in OWN_TEXT),
        ("features", train.features, not train.wanted_features),
        ("token_weights", train.token_weights, not train.token_weights),
        ("select", train.select, not train.select),
        ("target_format", train.target_format, train.target_format in ("hidden", "full")),
    ):
        if not plain:
            raise UserError(
                f"teacher.draws {draws} averages stored distributions, which train.{name} = {found!r} cannot be used with; "
                f"set one of them otherwise (draws = 1 works with all)"
            )


def check_report_settings(settings: "RunConfig", text: Text, teacher: Any) -> None:
    """Refuse what the report could not say in the end, before the student is built. Raises UserError naming the flag."""
    from moe2dense.evaluation.baselines import check_baselines
    from moe2dense.evaluation.judge import check_judge

    options = settings.evaluate
    held = [d for part in (text.valid, text.ood) if part is not None for d in part.domains]
    check_allowed(options.allow_loss, held)
    check_baselines(options.baseline, teacher.tokenizer())
    if options.judge:
        check_judge(options.judge, teacher.path)


def check_allowed(allowed: "Sequence[str]", domains: "Sequence[str]") -> None:
    """Raises UserError for domains that the held-out text does not have, and where nothing would be left to judge."""
    known = sorted(set(domains) - {""})
    unknown = [d for d in allowed if d not in known]
    if unknown and not known:
        raise UserError(
            f"--allow-loss {','.join(allowed)}: the held-out text has no domains; its records need a `domain` beside their text"
        )
    if unknown:
        raise UserError(
            f"--allow-loss names {', '.join(map(repr, unknown))}, which the held-out text does not have{nearest(unknown[0], known)}; "
            f"its domains are {', '.join(known)}"
        )
    if allowed and not set(domains) - set(allowed):
        raise UserError(
            f"--allow-loss {','.join(allowed)} names every domain of the held-out text; leave out what is to survive"
        )


def check_settings(settings: RunConfig) -> None:
    """Refuse what no stage could do, before anything is read. Raises UserError naming the flag."""
    from moe2dense.distillation.checks import check_training
    from moe2dense.distillation.regimes.registry import check_regime_settings
    from moe2dense.student.ffn.methods import parse_method

    parse_method(settings.build.init)
    check_training(settings.train)
    check_text_settings(settings)
    check_regime_settings(settings)
    for flag, value, known in (
        ("--experts", settings.teacher.experts, ["auto", "streamed", "grouped_mm", "megablocks"]),
        ("--dtype", settings.export.dtype, ["bfloat16", "float16", "float32"]),
        ("--quantize", settings.export.quantize, ["", "int8", "int4"]),
        ("build.prune", settings.build.prune, ["auto", "width", "depth", "heads"]),
        ("build.depth", settings.build.depth, ["influence", "alternate"]),
    ):
        if value not in known:
            raise UserError(f"{flag} must be one of {', '.join(k for k in known if k)}; found {value!r}")
    for flag, value in (
        ("--tokens", settings.train.tokens),
        ("--lora", settings.train.lora),
        ("--block", settings.data.block),
    ):
        if value < 0:
            raise UserError(f"{flag} must not be negative; found {value}")
    if settings.train.temperature <= 0:
        raise UserError(f"--temperature must be above 0; found {settings.train.temperature}")
    if not 0 <= settings.train.alpha <= 1:
        raise UserError(f"--alpha must be between 0 and 1; found {settings.train.alpha}")
