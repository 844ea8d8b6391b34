"""From TOML and flags to a RunConfig, and back: defaults < teacher card < checkpoint folder < --config < flags."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomlkit

from moe2dense.config.options import Option, entries, option_of
from moe2dense.config.renames import renamed_value, suggest_key
from moe2dense.config.schema import RunConfig
from moe2dense.errors import UserError, nearest

T = TypeVar("T")


def config_table(config: RunConfig) -> dict[str, Any]:
    """Return a config as nested plain values, ready for TOML or JSON."""
    return dataclasses.asdict(config)


def write_config(config: RunConfig) -> str:
    """Return the resolved config as TOML text."""
    return write_config_table(config_table(config))


def write_config_table(table: dict[str, Any]) -> str:
    """Return nested plain values as TOML text."""
    return tomlkit.dumps(table)


def read_toml(path: str | Path, argument: str = "--config") -> dict[str, Any]:
    """Read a TOML file as a table. Raises UserError naming the argument."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{argument} {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{argument} {path} is not valid TOML: {error}") from error


def read_config(path: str | Path) -> RunConfig:
    """Read a RunConfig from a file that `write_config` wrote."""
    return merge(RunConfig(), read_toml(path), f"config {path}")


def _check(value: Any, kind: type, option: Option, key: str, subject: str) -> Any:
    """Return a value as its option's type. Raises UserError for another type and for a value that is no choice."""
    if isinstance(value, str) and option.parse is not None:
        value = option.parse(value, subject)
    value = _typed(value, kind, subject)
    if (new := renamed_value(key, value)) is not None:
        raise UserError(f"{subject} {value!r} was renamed; did you mean {new!r}?")
    if option.choices and value not in option.choices:
        known = [choice for choice in option.choices if choice]
        raise UserError(f"{subject} must be one of {', '.join(known)}; found {value!r}{nearest(str(value), known)}")
    return value


def _typed(value: Any, kind: type, subject: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise UserError(f"{subject} must be a list of names; found {value!r}")
    if kind is str and isinstance(value, (int, float, Path)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{subject} must be {kind.__name__}; found {value!r}")
    return value


def merge(config: T, table: dict[str, Any], origin: str, prefix: str = "", flag: str = "") -> T:
    """Return `config` with the values of a nested table. Raises UserError for an unknown key, naming the nearest valid one.

    origin: what errors call the source of the table, such as `--config run.toml`; flag: the flag that gave its only value.
    """
    kinds = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in kinds:
            raise UserError(
                f"{origin}: unknown key {prefix + key!r}{suggest_key(prefix.rstrip('.'), key, list(kinds))}"
            )
        if dataclasses.is_dataclass(kinds[key]):
            if not isinstance(value, dict):
                raise UserError(f"{origin}: {prefix + key} must be a table; found {value!r}")
            values[key] = merge(getattr(config, key), value, origin, f"{prefix}{key}.", flag)
        else:
            subject = flag or f"{origin}: {prefix}{key}"
            values[key] = _check(value, kinds[key], option_of(type(config), key), prefix + key, subject)
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def merge_flags(config: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """Return `config` with flags given as {'train.lr': value}; None means not given. Raises UserError naming the flag."""
    flag_names = {entry.key: entry.flag for entry in entries(RunConfig)}
    for key, value in flags.items():
        if value is not None:
            config = merge(config, _nested(key, value), "flags", flag=flag_names.get(key, ""))
    return config


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    """('train.lr', 1) -> {'train': {'lr': 1}}."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return 'train.lr: 0.001 -> 0.002' for every value that differs."""
    before, after = _flat(config_table(old)), _flat(config_table(new))
    return [f"{k}: {before[k]!r} -> {after[k]!r}" for k in before if before[k] != after[k]]
