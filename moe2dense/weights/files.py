"""Decide which files of a folder hold its weights, as transformers decides it, and refuse what it would read otherwise.

transformers takes the first of: the file that config.json names as `transformers_weights`, model.safetensors, the shards of
model.safetensors.index.json. An adapter in the folder is applied to what it has read. Nothing here imports torch.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2dense.common.files import refuse_outside_links
from moe2dense.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF_SUFFIX = ".gguf"
ADAPTER_CONFIG = "adapter_config.json"
_GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a folder's weights: safetensors, or without any, GGUF."""

    folder: Path
    # in the order in which transformers reads them
    files: tuple[Path, ...]
    # the index that names them, and its {tensor: file name}; None and {} for a single file
    index: Path | None = None
    weight_map: dict[str, str] | None = None
    # the index that is not read, where a single file goes before it
    unread_index: Path | None = None


def weight_files(folder: str | Path) -> WeightFiles:
    """Return the files that hold a folder's weights.

    Raises UserError for links that lead out of the folder, for an adapter, for pickled weights, for a variant alone, for a missing shard and where there are none.
    """
    folder = Path(folder)
    refuse_outside_links(folder)
    refuse_adapter(folder)
    named = _named_by_config(folder)
    if named and not named.endswith(".index.json"):
        return WeightFiles(folder, (_inside(folder, named),))
    single, index = folder / SINGLE, folder / (named or INDEX)
    if not named and single.is_file():
        return WeightFiles(folder, (single,), unread_index=index if index.is_file() else None)
    if index.is_file():
        weight_map = read_index(index)
        files = tuple(_inside(folder, name) for name in sorted(set(weight_map.values())))
        return WeightFiles(folder, files, index, weight_map)
    if files := _gguf_files(folder):
        return WeightFiles(folder, files)
    raise _no_weights(folder)


def _gguf_files(folder: Path) -> tuple[Path, ...]:
    """Return a folder's GGUF file, or its parts in their order; () without one. Raises UserError for several, or a missing part."""
    files = sorted(folder.glob(f"*{GGUF_SUFFIX}"))
    parts = [_GGUF_PART.fullmatch(path.name) for path in files]
    models = {path.name if part is None else part[1] for path, part in zip(files, parts, strict=True)}
    if len(models) > 1:
        raise UserError(
            f"checkpoint {folder} holds several GGUF models ({', '.join(sorted(models)[:3])}, ...); leave one of them in a folder with "
            f"config.json and the tokenizer"
        )
    split = [part for part in parts if part is not None]
    if split and (len(split) != int(split[0][3]) or len(split) != len(files)):
        raise UserError(
            f"checkpoint {folder} holds {len(split)} of {int(split[0][3])} parts of {split[0][1]}; download the others"
        )
    return tuple(files)


def holds_weights(folder: str | Path) -> bool:
    """Return whether a folder holds any file that may be weights, in whatever form."""
    patterns = (
        "*.safetensors",
        "*.safetensors.index.json",
        f"*{GGUF_SUFFIX}",
        "*.bin",
        "*.pt",
        "*.pth",
        ADAPTER_CONFIG,
    )
    return any(next(Path(folder).glob(pattern), None) is not None for pattern in patterns)


def refuse_adapter(folder: str | Path) -> None:
    """Raise UserError for a folder with an adapter, which transformers applies to the weights beside it."""
    name = next((name for name in _ADAPTER_FILES if (Path(folder) / name).is_file()), "")
    if name:
        raise UserError(
            f"{folder} holds an adapter ({name}), which transformers applies to the weights beside it and moe2dense does not read; "
            f"merge it into the weights first (peft: merge_and_unload() of the loaded model, then save_pretrained to a new folder), "
            f"or move the adapter's files away to use the weights without it"
        )


def read_index(path: Path) -> dict[str, str]:
    """Return {tensor: file name} of an index. Raises UserError where it cannot be read."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint index {path} is not valid JSON with a weight_map") from error
    if not weight_map:
        raise UserError(f"checkpoint index {path} names no tensor; download it again")
    return weight_map


def _named_by_config(folder: Path) -> str:
    """Return the file that config.json names as its weights, or ''. Raises UserError for one that is not safetensors."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""  # the config is read, and complained of, elsewhere
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if not named:
        return ""
    if not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"checkpoint {folder}: config.json names {named!r} as its weights, which is no safetensors file"
        )
    return str(named)


def _inside(folder: Path, name: str) -> Path:
    """Return the file of this name. Raises UserError for one outside the folder, or missing."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"checkpoint {folder}: the weights are said to lie in {name!r}, outside the folder")
    if not path.is_file():
        raise UserError(f"checkpoint {folder}: file {name}, named in the index, is missing; download it again")
    return path


def _no_weights(folder: Path) -> UserError:
    """Return what to say of a folder without weights that are read."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return UserError(
            f"checkpoint {folder} holds pickled weights, which can run code when loaded; convert it to safetensors"
        )
    variants = sorted(p.name for p in folder.glob("model.*.safetensors")) + sorted(
        p.name for p in folder.glob("model.safetensors.index.*.json")
    )
    if variants:
        return UserError(
            f"checkpoint {folder} holds only a variant ({variants[0]}), which is loaded by its name alone; "
            f"rename it to {SINGLE if variants[0].endswith('.safetensors') else INDEX}"
        )
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    remedy = f"; {shards[0]} is there without an index that names it" if shards else ""
    return UserError(f"checkpoint {folder} has neither {SINGLE} nor {INDEX}{remedy}")
