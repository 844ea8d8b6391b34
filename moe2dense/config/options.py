"""Describe an option once: its default, help, unit and example, from which flags, `--help` and the reference are made.

No torch and no command line here: an option is a dataclass field with an `Option` in its metadata.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from moe2dense.common.units import names, parse_count, show_count

T = TypeVar("T")
_KEY = "option"
# The heading under which a table's options stand in `--help`, unless an option names another.
_GROUPS = {
    "": "Essentials",
    "teacher": "Teacher",
    "endpoint": "Teacher",
    "data": "Text",
    "write": "Text",
    "build": "Build",
    "train": "Training",
    "regime": "Training",
    "evaluate": "Comparison",
    "export": "Output",
}


@dataclass(frozen=True)
class Option:
    """What a stranger needs to know about one option."""

    help: str  # plain sentences
    unit: str = ""  # what a number counts: tokens, blocks, steps
    example: str = ""  # a value, as it is typed behind the flag
    choices: tuple[str, ...] = ()  # every value there is; empty = any
    shown: str = ""  # what stands for the default where the bare value says nothing ("" or 0)
    group: str = ""  # heading in `--help`; "" = that of the table
    flag: str = ""  # its flag, where that is not the key's own name
    parse: Callable[[str, str], Any] | None = None  # from text, and what errors call the option, to the value


@dataclass(frozen=True)
class Entry:
    """An option where it stands: its dotted key, its type and its default."""

    key: str
    kind: Any
    default: Any
    option: Option

    @property
    def group(self) -> str:
        """The heading under which the option stands in `--help`."""
        return self.option.group or _GROUPS[self.key.rpartition(".")[0]]

    @property
    def flag(self) -> str:
        """The option as it is typed, such as --lr."""
        return self.option.flag or f"--{self.key.rpartition('.')[2].replace('_', '-')}"

    @property
    def default_text(self) -> str:
        """The default as help pages and the reference show it."""
        if self.option.shown:
            return self.option.shown
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        if self.option.parse is parse_count and parse_count(show_count(self.default)) == self.default:
            return show_count(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def option(
    default: T,
    *,
    help: str,
    unit: str = "",
    example: str = "",
    choices: tuple[str, ...] = (),
    shown: str = "",
    group: str = "",
    flag: str = "",
    parse: Callable[[str, str], Any] | None = None,
) -> T:
    """Return a dataclass field with this default that carries its description."""
    described = Option(help, unit, example, choices, shown, group, flag, parse)
    return dataclasses.field(default=default, metadata={_KEY: described})


def parse_names(text: str, what: str) -> tuple[str, ...]:
    """`code, drama` -> ("code", "drama")."""
    return tuple(names(text) or ())


def entries(config: type, prefix: str = "") -> Iterator[Entry]:
    """Yield every option of a config class, tables within it included, in the order they are written.

    Raises TypeError for a field that is neither a table nor described.
    """
    kinds = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, key = kinds[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from entries(kind, f"{key}.")  # type: ignore[arg-type]
        elif isinstance(field.metadata.get(_KEY), Option):
            yield Entry(key, kind, field.default, field.metadata[_KEY])
        else:
            raise TypeError(f"{config.__name__}.{field.name} has no description; give it option(default, help=...)")


def option_of(config: type, name: str) -> Option:
    """Return the description of one option of a config class."""
    return next(f.metadata[_KEY] for f in dataclasses.fields(config) if f.name == name)
