"""Read passages of text from local files, folders of splits, or the hub, all with `datasets`.

A passage is a dict with `text` (or `messages`, for chat; or `prompt` and `completion`) and perhaps `domain`.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from huggingface_hub import constants, dataset_info

from moe2dense.common.hub import hub_unreachable
from moe2dense.errors import UserError, first_line

_FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",), "ood": ("ood",)}
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
_BUCKETS = {0: "valid", 1: "test"}  # of 20, by hash of the passage; the rest is train
_PASSAGE = 2000  # characters gathered into one passage of a plain .txt file
_SHUFFLE_BUFFER = 2000  # records of a streamed dataset among which the order is drawn
HOW = "pass --data with a folder of {train,valid,test}.jsonl, one .jsonl/.txt/.parquet file, or a hub id"


def passages(path: str | Path, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return the passages of one split in a seeded order that is the same on every machine.

    A folder gives its `split` file; a single file, or a hub dataset that has only `train`, is split by a hash of
    each passage (90% train, 5% valid, 5% test); the split `all` is a single file as it stands. Raises UserError when the
    source is missing, empty, unreadable, without a `text` or `messages` field, or out of reach.
    """
    if split not in (*_NAMES, "all"):
        raise UserError(f"split must be one of {', '.join(_NAMES)}, all; found {split!r}")
    where = Path(path).expanduser()
    if split == "all":
        if not where.is_file():
            raise UserError(f"data {str(path)!r}: the split `all` needs a single file; {HOW}")
        return iter(_local([where], where, seed))
    if where.is_dir():
        rows, hashed = _local(_split_files(where, split), where, seed), False
    elif where.is_file():
        rows, hashed = _local([where], where, seed), True
    elif _HUB_ID.match(str(path)) and _kind(where) is None:
        rows, hashed = _hub(str(path), split, seed)
    else:
        raise UserError(f"data {str(path)!r} does not exist; {HOW}")
    if hashed and split == "ood":
        raise UserError(
            f"data {str(path)!r} has no ood split: out-of-distribution text needs a file of its own (--ood)"
        )
    return (row for row in rows if not hashed or _bucket(row) == split)


def _bucket(row: dict[str, Any]) -> str:
    """Return the split of a passage, by a hash of its text."""
    content = next((row[k] for k in ("text", "prompt") if row.get(k) is not None), None) or repr(row.get("messages"))
    return _BUCKETS.get(xxhash.xxh3_64_intdigest(str(content).encode()) % 20, "train")


def _kind(path: Path) -> str | None:
    """Return the `datasets` builder for a file name, or None."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return _FORMATS.get(suffixes[-1].lower()) if suffixes else None


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return train.jsonl, or the shards train-00000-of-00004.parquet ..., of `folder`. Raises UserError without any."""
    data = sorted(p for p in folder.iterdir() if p.is_file() and _kind(p))
    files = [p for p in data if any(p.name.split(".")[0] == n or p.name.startswith(n + "-") for n in _NAMES[split])]
    if not files:
        present = ", ".join(p.name for p in data[:5]) or "no data files"
        raise UserError(f"data folder {folder} has no {split} file (found {present}); add {split}.jsonl or pass a file")
    if len({_kind(p) for p in files}) > 1:
        raise UserError(
            f"data folder {folder} has {split} files of several formats: {', '.join(p.name for p in files)}"
        )
    return files


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switch the progress bars of `datasets` off within the context."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _local(files: list[Path], where: Path, seed: int) -> Iterable[dict[str, Any]]:
    """Return the passages of files of one format in a seeded order. Raises UserError where they cannot be read."""
    kind = _kind(files[0])
    if kind is None:
        raise UserError(f"data file {where} has an unknown ending; use one of {', '.join(_FORMATS)} (also .gz)")
    if not any(p.stat().st_size for p in files):
        raise UserError(f"data {files[0]} is empty; {HOW}")
    options: dict[str, Any] = {"sample_by": "paragraph"} if kind == "text" else {}
    with _without_bars():
        try:  # memory-mapped: a file larger than RAM is read page by page
            data = datasets.load_dataset(kind, data_files=[str(p) for p in files], split="train", **options)
        except Exception as error:  # the library wraps a reader's errors in many types
            cause = error.__cause__ or error
            raise UserError(f"data {files[0]} cannot be read as {kind}: {first_line(cause)}") from error
    if kind == "text":
        return _shuffled(_joined(data["text"]), seed)
    _check_fields(data.column_names, files[0])
    return data.shuffle(seed=seed) if len(data) else data


def _joined(paragraphs: Iterable[str]) -> list[dict[str, Any]]:
    """Gather consecutive paragraphs into passages, so that a block of plain text keeps its context."""
    joined: list[dict[str, Any]] = []
    part: list[str] = []
    for paragraph in paragraphs:
        part.append(paragraph)
        if sum(map(len, part)) >= _PASSAGE:
            joined.append({"text": "\n\n".join(part)})
            part = []
    return [*joined, {"text": "\n\n".join(part)}] if part else joined


def _shuffled(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the rows in a seeded order."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def _check_fields(names: list[str], where: Path | str) -> None:
    """Raise UserError where records have no field that holds text."""
    if not {"text", "messages", "prompt"} & set(names):
        raise UserError(
            f"data {where} has no `text` field (found {', '.join(names) or 'none'}); "
            "each record needs `text`, `messages` for chat, or `prompt` and `completion`, and may have `domain`"
        )


def _hub(name: str, split: str, seed: int) -> tuple[Iterable[dict[str, Any]], bool]:
    """Return a streamed hub dataset, `owner/name` or `owner/name:configuration`, and whether it must be split by hash.

    Raises UserError where it cannot be reached, or has no such split.
    """
    if reason := hub_unreachable():
        raise UserError(f"data {name!r} is no file or folder here, and the hub cannot be reached ({reason}); {HOW}")
    repository, _, configuration = name.partition(":")
    with _without_bars():
        try:
            if not constants.HF_HUB_OFFLINE:
                dataset_info(repository, timeout=10)  # fails at once where `datasets` would retry for half a minute
            available = datasets.get_dataset_split_names(repository, configuration or None)
            wanted = next((n for n in _NAMES[split] if n in available), None)
            hashed = available == ["train"]
            data = None
            if wanted or hashed:
                data = datasets.load_dataset(repository, configuration or None, split=wanted or "train", streaming=True)
        except Exception as error:  # no network, offline mode, no such dataset, gated, ...: one remedy for all
            raise UserError(
                f"data {name!r} is no file or folder here and cannot be read from the hub ({first_line(error)}); {HOW}"
            ) from error
    if data is None:
        raise UserError(
            f"hub dataset {name!r} has no {split} split (found {', '.join(available)}); pass a file instead"
        )
    if data.column_names:
        _check_fields(data.column_names, name)
    return data.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), hashed
