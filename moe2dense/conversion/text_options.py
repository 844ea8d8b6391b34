"""How a run's settings say that text is read, and the day that its chat templates are told."""

from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from moe2dense.common.processes import from_first
from moe2dense.config.schema import DataConfig
from moe2dense.config.toml import read_toml
from moe2dense.conversion.configure import CONFIG
from moe2dense.conversion.run import Run
from moe2dense.data.options import TextOptions

_NAMES = tuple(f.name for f in fields(TextOptions))


def text_options(data: DataConfig, day: str = "") -> TextOptions:
    """Return the options of a run that has resolved its settings. day: for templates with a date, where the settings name none."""
    values = {name: getattr(data, name) for name in _NAMES}
    return replace(TextOptions(**values), date=data.date or day)


def text_options_for(folder: str | Path | None, data: DataConfig) -> TextOptions:
    """Return the options for a command on one checkpoint: what its folder's moe2dense.toml says, where nothing else is asked for."""
    file = Path(folder) / CONFIG if folder else None
    table: dict[str, Any] = read_toml(file).get("data", {}) if file is not None and file.is_file() else {}
    unset = [name for name in _NAMES if getattr(data, name) == getattr(DataConfig(), name)]
    named = {name: table[name] for name in unset if isinstance(table.get(name), str)}
    if file is not None and named.get("chat_template"):
        named["chat_template"] = str(file.parent / named["chat_template"])
    return replace(text_options(data), **named)


def run_day(run: Run) -> str:
    """Return the day a run began, as 2026-11-28; run.json keeps it, so that a resumed run renders what the first one did.

    It is written with the first thing that is: a run that is refused before leaves no run.json.
    """
    return str(run.manifest.setdefault("date", from_first(lambda: date.today().isoformat())))
