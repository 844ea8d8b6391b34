"""Read passages of text from local files, folders of splits, or the hub, in a seeded order.

What a passage is says fields.py. Local files are read as they are now: no cache stands between.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe2dense.common.object_store import is_url
from moe2dense.data.counts import TextCounts, Unusable
from moe2dense.data.fields import passage_of, split_key
from moe2dense.data.files import FORMATS, SPLIT_NAMES, file_format, split_files
from moe2dense.data.hub import hub_records, hub_revision
from moe2dense.data.readers import read_records
from moe2dense.data.remote import remote_files, remote_is_file
from moe2dense.errors import UserError

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
_BUCKETS = {0: "valid", 1: "test"}  # of 20, by hash of the passage; the rest is train
HOW = "pass --data with a folder of {train,valid,test}.jsonl, one .jsonl/.txt/.parquet file, or a hub id"


@dataclass
class Cursor:
    """position: how many records of a source were taken, in its order, whether they are of the split and of use or not."""

    position: int = 0


def passages(path: str | Path, split: str, seed: int, counts: TextCounts | None = None) -> Iterator[dict[str, Any]]:
    """Return the passages of one split; see `located_passages`."""
    return (passage for _, passage in located_passages(path, split, seed, counts))


def located_passages(
    path: str | Path, split: str, seed: int, counts: TextCounts | None = None, cursor: Cursor | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return (where it stands, passage) of one split in a seeded order that is the same on every machine.

    A folder gives its `split` file; a single file, or a hub dataset that has only `train`, is split by a hash of
    each passage (90% train, 5% valid, 5% test); the split `all` is a single file as it stands. `counts` takes in what is read and
    skipped. cursor: where reading goes on, and, once a passage is there, where it would go on after it.
    Raises UserError when the source is missing, empty, unreadable, or out of reach.
    """
    records, hashed = _located_records(path, split, seed, counts, cursor or Cursor())
    if hashed:
        records = ((where, record) for where, record in records if _in_split(record, split))
    return usable(records, counts or TextCounts())


def usable(
    records: Iterable[tuple[str, dict[str, Any] | Unusable]], counts: TextCounts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, passage) of each record that holds one; count the others."""
    for where, record in records:
        try:
            if isinstance(record, Unusable):
                raise record
            passage = passage_of(record)
        except Unusable as reason:
            counts.skip(where, str(reason))
            continue
        yield where, passage


def _located_records(
    path: str | Path, split: str, seed: int, counts: TextCounts | None, cursor: Cursor
) -> tuple[Iterable[tuple[str, dict[str, Any] | Unusable]], bool]:
    """Return records, those that cannot be parsed included, and whether they must be split by hash. Raises UserError."""
    files = source_files(path, split)
    hashed = False
    if files:
        rows, hashed = _local(files, seed, counts, cursor), is_single_file(path) and split != "all"
    else:
        streamed, hashed = hub_records(str(path), split, seed, HOW)
        rows = _counted(zip((f"{path} record {n}" for n in count(1)), streamed, strict=False), cursor)
    if hashed and split == "ood":
        raise UserError(
            f"data {str(path)!r} has no ood split: out-of-distribution text needs a file of its own (--ood)"
        )
    return rows, hashed


def _in_split(record: dict[str, Any] | Unusable, split: str) -> bool:
    """Return whether a record of a single file is of this split, by a hash of its text; one without text is of each."""
    key = None if isinstance(record, Unusable) else split_key(record)
    if key is None:
        return True
    return _BUCKETS.get(xxhash.xxh3_64_intdigest(key.encode(errors="replace")) % 20, "train") == split


def is_single_file(path: str | Path) -> bool:
    """Return whether a source is one file, here or behind a URL. Raises UserError where a store cannot be asked."""
    return remote_is_file(str(path)) if is_url(path) else Path(path).expanduser().is_file()


def source_files(path: str | Path, split: str) -> list[Path]:
    """Return the local files that a split is read from, copies of those behind a URL; none for a dataset on the hub.

    Raises UserError for a split that there is not, and a source that is neither.
    """
    if split not in (*SPLIT_NAMES, "all"):
        raise UserError(f"split must be one of {', '.join(SPLIT_NAMES)}, all; found {split!r}")
    if split == "all" and not is_single_file(path):
        raise UserError(f"data {str(path)!r}: the split `all` needs a single file; {HOW}")
    if is_url(path):
        return remote_files(str(path), split)
    where = Path(path).expanduser()
    if where.is_dir():
        return split_files(where, split)
    if where.is_file():
        return [where]
    if _HUB_ID.match(str(path)) and file_format(where) is None:
        return []
    raise UserError(f"data {str(path)!r} does not exist; {HOW}")


def source_revision(path: str | Path, split: str) -> str:
    """Return what tells the version of a dataset on the hub: its name and revision; "" for local files."""
    return "" if source_files(path, split) else hub_revision(str(path))


def _counted(
    rows: Iterable[tuple[str, dict[str, Any]]], cursor: Cursor
) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """Yield the records of a stream from where the cursor stands."""
    for row in islice(rows, cursor.position, None):
        cursor.position += 1
        yield row


def _local(
    files: list[Path], seed: int, counts: TextCounts | None, cursor: Cursor
) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """Return the records of files of one format in a seeded order. Raises UserError where they cannot be read."""
    if file_format(files[0]) is None:
        raise UserError(
            f"data file {files[0]} has an unknown ending; use one of {', '.join(FORMATS)} (also .gz and .zst)"
        )
    if not any(p.stat().st_size for p in files):
        raise UserError(f"data {files[0]} is empty; {HOW}")
    records = read_records(files)
    if records.note and counts is not None:
        counts.notes[records.note] = 1

    def in_order() -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
        order = np.random.default_rng(seed).permutation(len(records))
        while cursor.position < len(order):
            index = int(order[cursor.position])
            cursor.position += 1
            try:
                record: dict[str, Any] | Unusable = records.record(index)
            except Unusable as reason:
                record = reason
            yield records.where(index), record

    return in_order()
