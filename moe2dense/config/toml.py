"""From TOML and flags to a RunConfig, and back: defaults < teacher card < checkpoint folder < --config < flags."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import tomlkit

from moe2dense.config.schema import RunConfig
from moe2dense.errors import UserError, nearest


def config_table(config: Any) -> dict[str, Any]:
    """A config as nested plain values, ready for TOML or JSON."""
    return dataclasses.asdict(config)


def write_config(config: RunConfig) -> str:
    """The resolved config as TOML text."""
    return write_config_table(config_table(config))


def write_config_table(table: dict[str, Any]) -> str:
    """Nested plain values as TOML text."""
    return tomlkit.dumps(table)


def read_toml(path: str | Path, argument: str = "--config") -> dict[str, Any]:
    """A TOML file as a table. Raises UserError naming the argument."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{argument} {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{argument} {path} is not valid TOML: {error}") from error


def read_config(path: str | Path) -> RunConfig:
    """A RunConfig from a file that `write_config` wrote."""
    return merge(RunConfig(), read_toml(path), f"config {path}")


def _check(value: Any, kind: Any, key: str, origin: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise UserError(f"{origin}: {key} must be a list of names; found {value!r}")
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{origin}: {key} must be {kind.__name__}; found {value!r}")
    return value


def merge(config: Any, table: dict[str, Any], origin: str, prefix: str = "") -> Any:
    """`config` with the values of a nested table. Raises UserError for an unknown key, naming the nearest valid one."""
    kinds = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in kinds:
            raise UserError(f"{origin}: unknown key {prefix + key!r}{nearest(key, list(kinds))}")
        if dataclasses.is_dataclass(kinds[key]):
            if not isinstance(value, dict):
                raise UserError(f"{origin}: {prefix + key} must be a table; found {value!r}")
            values[key] = merge(getattr(config, key), value, origin, f"{prefix}{key}.")
        else:
            values[key] = _check(value, kinds[key], prefix + key, origin)
    return dataclasses.replace(config, **values)


def merge_flags(config: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """`config` with flags given as {'train.lr': value}; None means not given."""
    for dotted, value in flags.items():
        if value is None:
            continue
        table: dict[str, Any] = {}
        inner = table
        *parents, leaf = dotted.split(".")
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
        config = merge(config, table, f"--{leaf.replace('_', '-')}")
    return config


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """'train.lr: 0.001 -> 0.002' for every value that differs."""
    before, after = _flat(config_table(old)), _flat(config_table(new))
    return [f"{k}: {before[k]!r} -> {after[k]!r}" for k in before if before[k] != after[k]]
