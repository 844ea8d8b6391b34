"""Resolve the settings of a run: defaults, then teacher card, checkpoint folder, TOML file and flags."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge, merge_flags, read_toml
from moe2dense.errors import UserError


def default_out(teacher: str, to: str) -> str:
    """./mixtral-7b for `convert mixtral --to 7b`."""
    return f"./{teacher}-{Path(to).name.replace('%', 'pct').lower()}"


def stage_sizes(stages: str) -> list[str]:
    """`47%,40%` -> ["47%", "40%"]. Raises UserError for fewer than two sizes or an empty one."""
    sizes = [part.strip() for part in stages.split(",")]
    if len(sizes) < 2 or not all(sizes):
        raise UserError(f"--stages must name at least two sizes from large to small, such as 47%,40%; found {stages!r}")
    return sizes


def with_last_stage(settings: RunConfig) -> RunConfig:
    """Settings whose `to` is the last of `stages`; a `to` that is not among them becomes the last. Raises UserError."""
    stages = settings.stages
    if settings.to and settings.to not in [part.strip() for part in stages.split(",")]:
        stages = f"{stages},{settings.to}"
    last = stage_sizes(stages)[-1]
    if settings.to not in ("", last):
        raise UserError(f"--to {settings.to} is not the last of --stages {stages}; leave --to out")
    return replace(settings, to=last, stages=stages)


def configure(teacher: str, to: str, config: str | Path | None, flags: dict[str, Any]) -> RunConfig:
    """The resolved settings of a run: defaults < teacher card < the checkpoint folder's moe2dense.toml < --config < flags.

    A checkpoint folder may carry a moe2dense.toml with defaults of its own; a data path in it is relative to that folder.
    Raises UserError for an unknown teacher, an unknown key or a value of the wrong kind.
    """
    from moe2dense.families.resolve import resolve_teacher

    from_file = read_toml(config) if config else {}
    card_path = flags.get("teacher.card") or from_file.get("teacher", {}).get("card", "")
    resolved = resolve_teacher(teacher, card_path)
    settings = RunConfig(model=teacher, to=to)
    settings = merge(settings, resolved.card.defaults, f"teacher card {resolved.card.model_type}")
    if resolved.path and (resolved.path / "moe2dense.toml").is_file():
        own = resolved.path / "moe2dense.toml"
        table = read_toml(own)
        for name in ("path", "valid", "ood"):
            if table.get("data", {}).get(name):
                table["data"][name] = str((own.parent / table["data"][name]).resolve())
        settings = merge(settings, table, str(own))
    settings = merge(settings, from_file, f"--config {config}")
    settings = merge_flags(settings, flags)
    if settings.stages:
        settings = with_last_stage(settings)
    if not settings.to:
        raise UserError("--to is missing; give a size (7b), a share (25%), a named target or a dense checkpoint")
    if not settings.out:
        settings = dataclasses.replace(settings, out=default_out(resolved.name, settings.to))
    return settings
