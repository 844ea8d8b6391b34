"""Refuse settings, places and text that a conversion could not use, before anything is computed.

The one place that calls the checks of every package; what concerns several packages at once is checked here.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe2dense.common.http import check_url
from moe2dense.common.object_store import is_url
from moe2dense.common.units import parse_bytes, parse_memory
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.configure import texts_of_folder
from moe2dense.conversion.job import Text, load_split, split_source
from moe2dense.conversion.machine import check_device
from moe2dense.conversion.mirroring import check_mirror
from moe2dense.conversion.run import check_out
from moe2dense.conversion.text_options import text_options
from moe2dense.data.counts import TextCounts
from moe2dense.data.load import check_source
from moe2dense.data.vocabulary import check_vocabulary
from moe2dense.distillation.adapters import check_adapters
from moe2dense.distillation.checks import check_training
from moe2dense.distillation.regimes.checks import brings_targets, check_regime_settings
from moe2dense.distillation.regimes.registry import writes_text
from moe2dense.distillation.select_blocks import parse_selection
from moe2dense.distillation.targets.store import read_manifest
from moe2dense.errors import UserError, first_line, nearest
from moe2dense.evaluation.baselines import check_baselines
from moe2dense.evaluation.judge import check_judge
from moe2dense.exporting.api import HF_QUANTIZE, check_quantize
from moe2dense.exporting.quantize import check_layers
from moe2dense.families.resolve import ResolvedTeacher
from moe2dense.generation.filters import parse_band
from moe2dense.generation.sampling import Sampling
from moe2dense.modeling.empty import empty_model
from moe2dense.student.ffn.methods import parse_method
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.model import Teacher


def check_settings(settings: RunConfig) -> None:
    """Refuse what no stage could do, before anything is read. Raises UserError naming the flag."""
    parse_method(settings.build.init)
    check_training(settings.train)
    check_text_settings(settings)
    check_regime_settings(settings)
    if settings.teacher.memory != "auto":
        parse_memory(settings.teacher.memory, "--memory")
    if settings.teacher.gpu_memory != "auto":
        parse_memory(settings.teacher.gpu_memory, "--gpu-memory")
    check_targets_disk(settings)
    for flag, value in (
        ("--tokens", settings.train.tokens),
        ("--lora", settings.train.lora),
        ("--block", settings.data.block),
    ):
        if value < 0:
            raise UserError(f"{flag} must not be negative; found {value}")
    if settings.train.epochs < 0:
        raise UserError(f"--epochs must not be negative; found {settings.train.epochs:g}")
    if settings.train.temperature <= 0:
        raise UserError(f"--temperature must be above 0; found {settings.train.temperature}")
    if not 0 <= settings.train.alpha <= 1:
        raise UserError(f"--alpha must be between 0 and 1; found {settings.train.alpha}")


def check_text_settings(settings: RunConfig) -> None:
    """Refuse settings of [write] and train.select that mean nothing. Raises UserError."""
    write = settings.write
    if not 0 <= write.share <= 1:
        raise UserError(f"write.share must lie between 0 and 1; found {write.share:g}")
    if write.extra < 0 and write.extra != -1:
        raise UserError(f"write.extra must not be negative; found {write.extra:g}")
    extra = max(0.0, write.extra)
    if extra and settings.stages:
        raise UserError("write.extra adds to one text, and --stages divides it; leave one out, or use write.share")
    if write.share or write.extra:
        Sampling(write.temperature, write.top_p, write.beams)
        parse_band(write.nll)
    if not 0 <= write.duplicates <= 1:
        raise UserError(f"write.duplicates must lie between 0 and 1; found {write.duplicates:g}")
    if parse_selection(settings.train.select) and brings_targets(settings.train.regime, settings.regime):
        raise UserError(
            f"train.select chooses by the teacher's targets of the text, which the {settings.train.regime} regime has none of; leave one out"
        )
    check_draws(settings)
    check_endpoint(settings)
    if settings.train.targets and (write.share or extra or settings.train.select):
        raise UserError(
            "train.targets are of the data as it is; leave out write.share, write.extra and train.select, or the targets"
        )


def check_endpoint(settings: RunConfig) -> None:
    """Raise UserError for settings that need more of a teacher than the log-probabilities that a server gives."""
    endpoint, train, teacher = settings.endpoint, settings.train, settings.teacher
    if endpoint.k < 0:
        raise UserError(f"--endpoint-k must not be negative; found {endpoint.k}")
    if not endpoint.url:
        return
    check_url(endpoint.url)
    for name, value, plain in (
        ("loss", train.loss, train.loss == "forward_kl"),
        (
            "temperature",
            train.temperature_schedule or f"{train.temperature:g}",
            train.temperature == 1 and not train.temperature_schedule,
        ),
        ("features", train.features, not train.wanted_features),
        ("token_weights", train.token_weights, not train.token_weights),
        ("targets", train.targets, not train.targets),
    ):
        if not plain:
            raise UserError(
                f"--endpoint gives the likeliest tokens at temperature 1, which train.{name} = {value!r} cannot be used with; leave one out"
            )
    if teacher.draws or teacher.top_k or settings.stages:
        raise UserError(
            "--endpoint is asked for the teacher as it is served; leave out teacher.draws, teacher.top_k and --stages"
        )


def check_targets_disk(settings: RunConfig) -> None:
    """Raise UserError for a size that is none, and for what needs the targets of all text at once beside it."""
    train = settings.train
    if not train.targets_disk:
        return
    parse_bytes(train.targets_disk, "--targets-disk")
    if is_url(train.targets):
        return
    for name, value, whole in (
        ("--targets", train.targets, bool(train.targets)),
        ("--endpoint", settings.endpoint.url, bool(settings.endpoint.url)),
        ("train.select", train.select, bool(train.select)),
        ("train.token_weights", train.token_weights, bool(train.token_weights)),
        ("train.temperature_schedule", train.temperature_schedule, train.temperature_schedule == "auto"),
        ("teacher.draws", settings.teacher.draws, settings.teacher.draws > 1),
    ):
        if whole:
            raise UserError(
                f"--targets-disk keeps the targets of a part of the text at a time, {name} = {value!r} needs all of them; "
                "leave one out"
            )


def check_draws(settings: RunConfig) -> None:
    """Raise UserError where several answers of a teacher with drawn experts cannot be averaged."""
    draws, train = settings.teacher.draws, settings.train
    if draws < 0:
        raise UserError(f"teacher.draws must not be negative; found {draws}")
    if draws < 2:
        return
    for name, value, plain in (
        ("regime", train.regime, not writes_text(train.regime)),
        ("features", train.features, not train.wanted_features),
        ("token_weights", train.token_weights, not train.token_weights),
        ("select", train.select, not train.select),
        ("target_format", train.target_format, train.target_format in ("hidden", "full")),
    ):
        if not plain:
            raise UserError(
                f"teacher.draws {draws} averages stored distributions, which train.{name} = {value!r} cannot be used with; "
                f"set one of them otherwise (draws = 1 works with all)"
            )


def check_architecture(settings: RunConfig, target: Target) -> None:
    """Refuse adapters and rounding that the host's architecture has no place for. Raises UserError naming the setting."""
    if settings.train.lora:
        check_adapters(empty_model(target.config), settings.train)
    check_quantize(settings.export.format, settings.export.quantize)
    if settings.export.quantize in HF_QUANTIZE:
        check_layers(empty_model(target.config))


def check_places(settings: RunConfig, resume: bool) -> None:
    """Refuse a device that is not there and a run folder, a mirror or a URL of targets that cannot be used. Raises UserError."""
    check_device(settings.teacher.device)
    check_out(settings.out, resume)
    check_mirror(settings.mirror, Path(settings.out), resume)
    if is_url(settings.train.targets):
        read_manifest(settings.train.targets)


def check_text(settings: RunConfig, teacher: ResolvedTeacher, block: int) -> None:
    """Refuse text that is missing, unreadable, empty or too short for one block, reading no more than that of it.

    A teacher that is not on this machine yet has no tokenizer, so only the first passage is looked at. Raises UserError.
    """
    tokenizer = _tokenizer(teacher)
    for split in ("train", "valid", "ood"):
        if split == "ood" and not settings.data.ood:
            continue
        path, name = split_source(settings, split)
        try:
            if tokenizer is not None:
                options = text_options(settings.data)
                load_split(settings, split, tokenizer, block, block, options, TextCounts())
            else:
                check_source(path, name)
        except UserError as error:
            if path != settings.data.ood:
                raise
            of_folder = ", which the teacher's folder names" if "ood" in texts_of_folder(settings, teacher) else ""
            raise UserError(f"--ood{of_folder}: {error}") from error


def _tokenizer(teacher: ResolvedTeacher) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a teacher whose files are here; None for another. Raises UserError where they hold none that fits."""
    if teacher.path is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(teacher.path), trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways; all mean that none can be used
        raise UserError(f"teacher {teacher.path} has no tokenizer that can be loaded: {first_line(error)}") from error
    check_vocabulary(tokenizer, teacher.config.get_text_config().vocab_size, f"teacher {teacher.path}: its tokenizer")
    return tokenizer


def check_report_settings(settings: RunConfig, text: Text, teacher: Teacher) -> None:
    """Refuse what the report could not say in the end, before the student is built. Raises UserError naming the flag."""
    options = settings.evaluate
    domains = [d for part in (text.valid, text.ood) if part is not None for d in part.domains]
    check_allowed(options.allow_loss, domains)
    check_baselines(options.baseline, teacher.tokenizer())
    if options.judge:
        check_judge(options.judge, teacher.path)


def check_allowed(allowed: Sequence[str], domains: Sequence[str]) -> None:
    """Raise UserError for domains that the held-out text does not have, and where nothing would be left to judge."""
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
