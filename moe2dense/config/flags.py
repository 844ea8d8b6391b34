"""Make command-line flags from the descriptions of the config's options.

A command is a typed function whose annotations say which option a flag sets:
`tokens: Annotated[str | None, flag("train.tokens")] = None`. Flags that set no option carry their help themselves.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, get_args, get_type_hints

from cyclopts import Group, Parameter

from moe2dense.common.units import parse_count
from moe2dense.config.options import Entry, entries
from moe2dense.config.schema import RunConfig

# Headings of a help page, in their order.
GROUPS = {
    name: Group(name, sort_key=place)
    for place, name in enumerate(
        ("Essentials", "Text", "Build", "Training", "Comparison", "Output", "Teacher", "Upload")
    )
}


class Flag(Parameter):
    """A cyclopts parameter that knows the dotted key of the option it sets; "" where it sets none."""

    key = ""


def _described(help: str, unit: str, example: str) -> str:
    details = "; ".join(part for part in (unit, f"e.g. {example}" if example else "") if part)
    return f"{help}\n({details})" if details else help


def argument(
    help: str,
    *,
    group: str = "Essentials",
    unit: str = "",
    example: str = "",
    default: str | None = None,
    metavar: str | None = None,
) -> Flag:
    """Return the parameter of an argument that sets no option of the config.

    default: what the help page shows where the signature's default says nothing (None, "" or 0); metavar: what stands for the value.
    """
    return Flag(
        help=_described(help, unit, example),
        group=GROUPS[group],
        show_default=default or _default_text,
        metavar=metavar,
        negative=(),
    )


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
    option = entry.option
    parameter = Flag(
        help=_described(option.help, option.unit, option.example),
        group=GROUPS[group or entry.group],
        show_default=default or entry.default_text,
        choices=tuple(choice for choice in option.choices if choice) or None,
        metavar=_metavar(entry),
        negative_iterable=(),
    )
    object.__setattr__(parameter, "key", key)
    return parameter


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
def option_flags(function: Callable[..., Any]) -> dict[str, str]:
    """Return the option that each parameter of a command sets, as {parameter: dotted key}, read from its annotations."""
    hints = get_type_hints(function, include_extras=True)
    found = {name: [a for a in get_args(hint) if isinstance(a, Flag) and a.key] for name, hint in hints.items()}
    return {name: flags[0].key for name, flags in found.items() if flags}


def given_options(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} of the options that were given to a command.

    arguments: the command's parameters by name (its `locals()` at the start); None means not given.
    """
    keys = option_flags(function)
    return {key: arguments[name] for name, key in keys.items() if arguments[name] is not None}
