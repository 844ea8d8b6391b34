"""Several processes write one dataset: each its share of a round's texts, which rank 0 joins. Under torchrun.

A share stays in parts/ until the round's shard is listed, so that a killed run repeats only unfinished shares.
"""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from torch import distributed as dist

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import my_share, share_of, world
from moe2dense.generation.streamed import Completion

Write = Callable[[slice], list[Completion]]  # rows of a round -> what follows them


def written_by_all(folder: Path, first: int, count: int, write: Write) -> list[Completion]:
    """Return the completions of the texts numbered from `first` on, on rank 0; the others get none.

    Every process calls `write` for its share.
    """
    rank, processes = world()
    if processes == 1:
        return write(slice(0, count))
    share = my_share(count)
    part = _part(folder, first, share)
    if share.start < share.stop and not part.exists():
        atomic_write(part, json.dumps([astuple(c) for c in write(share)]))
    dist.barrier()
    if rank > 0:
        return []
    parts = [
        _part(folder, first, rows)
        for r in range(processes)
        if (rows := share_of(count, r, processes)).start < rows.stop
    ]
    return [Completion(*row) for part in parts for row in json.loads(part.read_text())]


def _part(folder: Path, first: int, rows: slice) -> Path:
    return folder / "parts" / f"{first + rows.start:09d}-{first + rows.stop:09d}.json"


def drop_parts(folder: Path, done: int) -> None:
    """Remove the shares of rounds that are listed: those of texts before number `done`."""
    for part in folder.glob("parts/*.json"):
        if int(part.stem.partition("-")[0]) < done:
            part.unlink()
    if (folder / "parts").is_dir() and not any((folder / "parts").iterdir()):
        (folder / "parts").rmdir()
