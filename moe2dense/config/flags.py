"""Make command-line flags from the descriptions of the config's options.

A command is a typed function whose annotations say which option a flag sets:
`tokens: Annotated[str | None, flag("train.tokens")] = None`. Flags that set no option carry their help themselves.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cyclopts import Group, Parameter

from moe2dense.common.units import parse_count
from moe2dense.config.options import Entry, Option, entries
from moe2dense.config.schema import RunConfig

# Headings of a help page, in their order.
GROUPS = {
    name: Group(name, sort_key=place)
    for place, name in enumerate(
        ("Essentials", "Text", "Build", "Training", "Comparison", "Output", "Teacher", "Upload")
    )
}


class Flag(Parameter):
    """A cyclopts parameter that knows the dotted key of the option it sets ("" where it sets none) and its description."""

    key: str
    option: Option
    heading: str


def _flag(option: Option, key: str, heading: str, **settings: Any) -> Flag:
    """A flag whose help page shows the description: help, then unit and example on a line of their own."""
    details = "; ".join(part for part in (option.unit, f"e.g. {option.example}" if option.example else "") if part)
    help = f"{option.help}\n({details})" if details else option.help
    flag = Flag(help=help, group=GROUPS[heading], validator=_refuse_url, **settings)
    for name, value in (("key", key), ("option", option), ("heading", heading)):
        object.__setattr__(flag, name, value)  # cyclopts' parameters are frozen
    return flag


def _refuse_url(_: object, value: object) -> None:
    """Refuse a URL where only a path of this machine is understood: `Path("s3://a/b")` would be the folder `s3:/a/b`."""
    if isinstance(value, Path) and re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
        raise ValueError("It is a URL; give a path of this machine.")


def argument(
    help: str,
    *,
    group: str = "Essentials",
    unit: str = "",
    example: str = "",
    default: str = "",
    metavar: str | None = None,
    name: str | None = None,
) -> Flag:
    """Return the parameter of an argument that sets no option of the config.

    default: what the help page shows where the signature's default says nothing (None, "" or 0); metavar: what stands for the value; name: how the
    flag is typed, where that is not the parameter's name.
    """
    described = Option(help, unit, example, shown=default)
    return _flag(described, "", group, show_default=default or _default_text, metavar=metavar, negative=(), name=name)


def _default_text(value: Any) -> str:
    return {True: "yes", False: "no", None: "none", "": "none"}.get(value, str(value))


@cache
def option_entries() -> dict[str, Entry]:
    """Return every option of a run by its dotted key."""
    return {entry.key: entry for entry in entries(RunConfig)}


def flag(key: str, *, group: str = "", default: str = "") -> Flag:
    """Return the parameter of a flag that sets the option `key`, described as the option is.

    group: another heading than the option's; default: another text where a command's own default differs.
    """
    entry = option_entries()[key]
    return _flag(
        replace(entry.option, shown=default or entry.default_text),
        key,
        group or entry.group,
        show_default=default or entry.default_text,
        choices=tuple(choice for choice in entry.option.choices if choice) or None,
        metavar=_metavar(entry),
        negative_iterable=(),
        name=entry.option.flag or None,
    )


def _metavar(entry: Entry) -> str:
    """What stands for the value of an option: the kind of thing one types."""
    if entry.option.choices:
        return "CHOICE"
    if entry.option.parse is parse_count:
        return "COUNT"
    if entry.option.unit == "bytes":
        return "SIZE"
    return {int: "N", float: "X"}.get(entry.kind, "TEXT")


@cache
def described_parameters(function: Callable[..., Any]) -> dict[str, Flag]:
    """Return the description of each parameter of a command, read from its annotations."""
    hints = get_type_hints(function, include_extras=True)
    flags = {name: [a for a in get_args(hint) if isinstance(a, Flag)] for name, hint in hints.items()}
    return {name: own[0] for name, own in flags.items() if own}


def option_flags(function: Callable[..., Any]) -> dict[str, str]:
    """Return the option that each parameter of a command sets, as {parameter: dotted key}."""
    return {name: flag.key for name, flag in described_parameters(function).items() if flag.key}


def default_text(flag: Flag, default: Any) -> str:
    """Return what help pages and the reference show for a parameter with this default."""
    return flag.option.shown or _default_text(default)


def given_options(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} of the options that were given to a command.

    arguments: the command's parameters by name (its `locals()` at the start); None means not given.
    """
    keys = option_flags(function)
    return {key: arguments[name] for name, key in keys.items() if arguments[name] is not None}
