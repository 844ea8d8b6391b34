"""Several processes write one dataset: each its share of a round's texts, the first puts them together. Under torchrun.

A share lies in parts/ until the round's shard is listed, so a run that was killed writes only the shares that were not whole.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from torch import distributed as dist

from moe2dense.errors import UserError
from moe2dense.generation.sequences import Completion
from moe2dense.run import atomic_write
from moe2dense.teacher.distributed import my_share, share_of, world

Write = Callable[[slice], list[Completion]]  # rows of a round -> what follows them


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """The rank of this process among those that torchrun started, which know each other inside; 0 when it is alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield world()[0]
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def written_by_all(folder: Path, first: int, count: int, write: Write) -> list[Completion]:
    """The completions of the texts numbered from `first` on; every process calls `write` for its share, all but rank 0 get none."""
    rank, processes = world()
    if processes == 1:
        return write(slice(0, count))
    mine, part = my_share(count), _part(folder, first, my_share(count))
    if mine.start < mine.stop and not part.exists():
        atomic_write(part, json.dumps([astuple(c) for c in write(mine)]))
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


def from_first(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every process; a UserError that it raises there is raised on all."""
    rank, processes = world()
    if processes == 1:
        return work()
    found: list[Any] = [None, ""]
    if rank == 0:
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]
