"""Resolve the settings of a run: defaults, then teacher card, checkpoint folder, TOML file and flags."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe2dense.config.schedules import with_temperature
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import differences, merge, merge_flags, read_config, read_toml
from moe2dense.conversion.default_text import default_text
from moe2dense.errors import UserError
from moe2dense.families.resolve import ResolvedTeacher, resolve_teacher

CONFIG = "moe2dense.toml"  # in a run folder its settings; in a teacher's folder defaults for its conversions
# What may differ between a run and its resumption: none of it changes the result.
FREE_KEYS = (
    "out",
    "mirror",
    "attention",
    "teacher.memory",
    "teacher.gpu_memory",
    "teacher.device",
    "teacher.experts",
    "train.report_to",
    "train.targets_disk",
)
_TEXTS = ("path", "valid", "ood")
_FILES = (*_TEXTS, "chat_template")  # of [data]


def default_out(teacher: str, to: str) -> str:
    """Return the folder of a run that names none: ./mixtral-7b for `convert mixtral --to 7b`."""
    return f"./{teacher}-{Path(to).name.replace('%', 'pct').lower()}"


def stage_sizes(stages: str) -> list[str]:
    """`47%,40%` -> ["47%", "40%"]. Raises UserError for fewer than two sizes or an empty one."""
    sizes = [part.strip() for part in stages.split(",")]
    if len(sizes) < 2 or not all(sizes):
        raise UserError(f"--stages must name at least two sizes from large to small, such as 47%,40%; found {stages!r}")
    return sizes


def with_last_stage(settings: RunConfig) -> RunConfig:
    """Return settings whose `to` is the last of `stages`; a `to` that is not among them becomes the last. Raises UserError."""
    stages = settings.stages
    if settings.to and settings.to not in [part.strip() for part in stages.split(",")]:
        stages = f"{stages},{settings.to}"
    last = stage_sizes(stages)[-1]
    if settings.to not in ("", last):
        raise UserError(f"--to {settings.to} is not the last of --stages {stages}; leave --to out")
    return replace(settings, to=last, stages=stages)


def folder_defaults(teacher: ResolvedTeacher) -> dict[str, Any]:
    """Return what a teacher's folder sets for its conversions, as a table; paths in it are made absolute. {} without a file."""
    file = teacher.path / CONFIG if teacher.path else None
    if file is None or not file.is_file():
        return {}
    table = read_toml(file)
    data = table.get("data", {})
    for name in _FILES:
        if data.get(name):
            data[name] = str((file.parent / data[name]).resolve())
    return table


def texts_of_folder(settings: RunConfig, teacher: ResolvedTeacher) -> tuple[str, ...]:
    """Return which of path, valid and ood are the texts that the teacher's folder names."""
    named = folder_defaults(teacher).get("data", {})
    return tuple(name for name in _TEXTS if named.get(name) and named[name] == getattr(settings.data, name))


def configure(
    teacher: str | None = None,
    to: str | None = None,
    config: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> RunConfig:
    """Return a run's settings: defaults < teacher card < the checkpoint folder's moe2dense.toml < --config < options.

    Where none of them names a text, it follows from what the teacher was made for.
    options: values by dotted key, such as {"train.lr": 0.1}; teacher and to are two of them. Raises UserError for a teacher or
    size that nobody named, an unknown teacher or key, and a value of the wrong kind.
    """
    options = with_temperature((options or {}) | {k: v for k, v in (("model", teacher), ("to", to)) if v})
    from_file = read_toml(config) if config else {}
    model = options.get("model") or from_file.get("model")
    if not model:
        raise UserError("TEACHER is missing; give the folder of a checkpoint, a hub id or a known name such as mixtral")
    card = options.get("teacher.card") or from_file.get("teacher", {}).get("card", "")
    resolved = resolve_teacher(str(model), str(card))
    settings = RunConfig(model=str(model))
    settings = merge(settings, resolved.card.defaults, f"teacher card {resolved.card.model_type}")
    settings = merge(settings, folder_defaults(resolved), str((resolved.path or Path()) / CONFIG))
    settings = merge(settings, from_file, f"--config {config}")
    settings = merge_flags(settings, options)
    if not settings.data.path:
        text = default_text(resolved.hub_id or resolved.name)
        settings = replace(settings, data=replace(settings.data, path=text))
    if settings.stages:
        settings = with_last_stage(settings)
    if not settings.to:
        raise UserError("--to is missing; give a size (7b), a share (25%), a named target or a dense checkpoint")
    return settings if settings.out else replace(settings, out=default_out(resolved.name, settings.to))


def resumed_folder(config: str | Path | None, options: dict[str, Any]) -> Path:
    """Return the folder of the run that --resume continues. Raises UserError where nothing names it."""
    return Path(options["out"] if "out" in options else configure(config=config, options=options).out)


def resumed_settings(config: str | Path | None = None, options: dict[str, Any] | None = None) -> RunConfig:
    """Return the settings of the run that --resume continues: those in its folder.

    What is given beside --out must say the same, except for what changes no result (FREE_KEYS). Raises UserError where the folder
    holds no run, and naming every option that differs.
    """
    options = with_temperature(options or {})
    folder = resumed_folder(config, options)
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume: {folder} holds no run (no {CONFIG}); start it without --resume")
    stored = read_config(folder / CONFIG)
    asked = merge(stored, read_toml(config), f"--config {config}") if config else stored
    asked = merge_flags(asked, options)
    if "stages" in options:
        asked = with_last_stage(asked)
    if _same_place(asked.model, stored.model):
        asked = replace(asked, model=stored.model)
    changed = [line for line in differences(stored, asked) if line.split(":")[0] not in FREE_KEYS]
    if changed:
        raise UserError(
            f"--resume: the settings differ from the run in {folder}: {'; '.join(changed)}; leave them out, or start "
            f"another run with another --out"
        )
    return replace(asked, out=str(folder))


def _same_place(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)
