"""Read passages of text from local files, folders of splits, or the hub, in a seeded order.

What a passage is says fields.py. Local files are read as they are now: no cache stands between.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe2dense.data.counts import TextCounts, Unusable
from moe2dense.data.fields import passage_of, split_key
from moe2dense.data.files import FORMATS, SPLIT_NAMES, file_format, split_files
from moe2dense.data.hub import hub_records
from moe2dense.data.readers import read_records
from moe2dense.errors import UserError

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
_BUCKETS = {0: "valid", 1: "test"}  # of 20, by hash of the passage; the rest is train
HOW = "pass --data with a folder of {train,valid,test}.jsonl, one .jsonl/.txt/.parquet file, or a hub id"


def passages(path: str | Path, split: str, seed: int, counts: TextCounts | None = None) -> Iterator[dict[str, Any]]:
    """Return the passages of one split; see `located_passages`."""
    return (passage for _, passage in located_passages(path, split, seed, counts))


def located_passages(
    path: str | Path, split: str, seed: int, counts: TextCounts | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return (where it stands, passage) of one split in a seeded order that is the same on every machine.

    A folder gives its `split` file; a single file, or a hub dataset that has only `train`, is split by a hash of
    each passage (90% train, 5% valid, 5% test); the split `all` is a single file as it stands. `counts` takes in what is read and
    skipped. Raises UserError when the source is missing, empty, unreadable, or out of reach.
    """
    records, hashed = _located_records(path, split, seed, counts)
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
    path: str | Path, split: str, seed: int, counts: TextCounts | None
) -> tuple[Iterable[tuple[str, dict[str, Any] | Unusable]], bool]:
    """Return records, those that cannot be parsed included, and whether they must be split by hash. Raises UserError."""
    if split not in (*SPLIT_NAMES, "all"):
        raise UserError(f"split must be one of {', '.join(SPLIT_NAMES)}, all; found {split!r}")
    where = Path(path).expanduser()
    if split == "all" and not where.is_file():
        raise UserError(f"data {str(path)!r}: the split `all` needs a single file; {HOW}")
    hashed = False
    if where.is_dir():
        rows = _local(split_files(where, split), seed, counts)
    elif where.is_file():
        rows, hashed = _local([where], seed, counts), split != "all"
    elif _HUB_ID.match(str(path)) and file_format(where) is None:
        streamed, hashed = hub_records(str(path), split, seed, HOW)
        rows = zip((f"{path} record {n}" for n in count(1)), streamed, strict=False)
    else:
        raise UserError(f"data {str(path)!r} does not exist; {HOW}")
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


def _local(files: list[Path], seed: int, counts: TextCounts | None) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
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
        for index in np.random.default_rng(seed).permutation(len(records)).tolist():
            try:
                record: dict[str, Any] | Unusable = records.record(index)
            except Unusable as reason:
                record = reason
            yield records.where(index), record

    return in_order()
