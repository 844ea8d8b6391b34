"""Write docs/cli.md and docs/options.md from the descriptions of flags and options: `python docs/generate_reference.py`."""

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from moe2dense.cli.app import COMMANDS
from moe2dense.config.flags import GROUPS, Flag, default_text, described_parameters
from moe2dense.config.options import Entry, entries
from moe2dense.config.schema import RunConfig

DOCS = Path(__file__).parent
_NOTE = "<!-- Written by docs/generate_reference.py; change the descriptions in moe2dense/config and moe2dense/cli. -->"
_TABLES = {
    "": "The run itself",
    "teacher": "How the teacher is run",
    "endpoint": "A teacher that a server runs",
    "data": "What text is used",
    "write": "Text that the teacher writes for its student",
    "build": "How the student is built from the teacher, before any training",
    "train": "How the student is trained",
    "regime": "Options of train.regime; each regime reads its own",
    "evaluate": "What the report compares with, and what the models write for it",
    "export": "The deployable checkpoint",
}


def _cell(text: str) -> str:
    """A text that keeps a table's columns: no line breaks, no bare bars, no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    columns = list(columns)
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows),
        "",
    ]


def _plain(text: str) -> str:
    """Text in which `A[+b][+c]` is no link: brackets that meet are kept apart from Markdown, except in code font."""
    parts = text.split("`")
    return "`".join(part if at % 2 else part.replace("][", "]\\[") for at, part in enumerate(parts))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _load(where: str) -> Callable[..., Any]:
    module, name = where.split(":")
    return getattr(import_module(module), name)


def _parameter_row(parameter: inspect.Parameter, flag: Flag) -> list[str]:
    """Name, help, default and example of one parameter."""
    keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    name = f"--{parameter.name.replace('_', '-')}" if keyword else parameter.name.upper()
    default = "required" if parameter.default is inspect.Parameter.empty else default_text(flag, parameter.default)
    if flag.option.unit:
        default = f"{default} ({flag.option.unit})"
    choices = [choice for choice in flag.option.choices or _literals(parameter.annotation) if choice]
    parts = [
        _plain(flag.option.help),
        f"One of {', '.join(choices)}." if choices else "",
        f"Sets `{flag.key}`." if flag.key else "",
    ]
    return [_code(name), " ".join(filter(None, parts)), default, _code(flag.option.example)]


def _literals(annotation: Any) -> list[str]:
    """The values that a parameter's type allows, where it lists them."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _literals(part)]


def command_page() -> str:
    """Return docs/cli.md: every command with its flags."""
    lines = [
        "# Commands",
        "",
        _NOTE,
        "",
        "`moe2dense COMMAND --help` shows the same in the terminal. A flag that sets an option of a run names it; every option can",
        "also stand in a TOML file, see [Options](options.md). Every command is a Python function of the same parameters.",
        "",
    ]
    for name, where, summary in COMMANDS:
        function = _load(where)
        flags = described_parameters(function)
        parameters = inspect.signature(function).parameters
        positional = [p.name.upper() for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        text = inspect.getdoc(function) or summary
        lines += [f"## {name}", "", text, "", f"    moe2dense {' '.join([name, *positional])} [FLAGS]", ""]
        for heading in GROUPS:
            rows = [_parameter_row(parameters[p], flag) for p, flag in flags.items() if flag.heading == heading]
            if rows:
                lines += [f"**{heading}**", "", *_table(("flag", "what it is", "default", "example"), rows)]
    return "\n".join(lines).rstrip() + "\n"


def _option_row(entry: Entry) -> list[str]:
    """Key, type, default, unit, help and example of one option."""
    option, default = entry.option, entry.default_text
    if entry.kind is bool:
        default, example = str(entry.default).lower(), str(not entry.default).lower()
    elif entry.kind in (int, float):
        example = option.example if _is_number(option.example) else f'"{option.example}"'
    elif entry.kind is str:
        example = f'"{option.example}"'
    else:
        example = "[" + ", ".join(f'"{part}"' for part in option.example.split(",")) + "]"
    kind = " or ".join(_code(choice) for choice in option.choices if choice) or _kind(entry.kind)
    return [_code(entry.key.rpartition(".")[2]), kind, default, option.unit, _plain(option.help), _code(example)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(kind: Any) -> str:
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(kind, "list of names")


def option_page() -> str:
    """Return docs/options.md: every key of a TOML file, by table."""
    lines = [
        "# Options",
        "",
        _NOTE,
        "",
        "Every option of a run can stand in a TOML file: `moe2dense convert --config run.toml`. Flags override the file, the file",
        "overrides the teacher's folder and card. `OUT/moe2dense.toml` of any run is such a file, complete. Counts may be written",
        'as text: `tokens = "20m"`.',
        "",
    ]
    every = list(entries(RunConfig))
    for table, title in _TABLES.items():
        rows = [_option_row(entry) for entry in every if entry.key.rpartition(".")[0] == table]
        heading = f"## [{table}]" if table else "## Above all tables"
        columns = ("key", "type", "default", "unit", "what it is", "example")
        lines += [heading, "", f"{title}.", "", *_table(columns, rows)]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    return {"cli.md": command_page(), "options.md": option_page()}


if __name__ == "__main__":
    for file, text in pages().items():
        (DOCS / file).write_text(text, encoding="utf-8")
