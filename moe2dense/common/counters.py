"""Count what a run costs while it runs: FLOPs by device, bytes from disk and over the bus, the most memory of each stage.

The code that makes a product or reads a file adds its size here; `metered` takes the difference between two moments. Counting
is an addition under a lock, so it is always on. Sums are of this process; `common.costs.cost_of_all` joins those of several.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from moe2dense.common.costs import Cost

_CLEAR_PEAK = "5"  # proc(5), clear_refs: sets the peak of resident memory to what it is now


@dataclass
class Totals:
    """Sums since the program began.

    flops: of matrix products, by the kind of device they were made on. disk: bytes read of weights and stored targets.
    bus: bytes that went between main memory and an accelerator.
    """

    flops: dict[str, float] = field(default_factory=dict)
    disk: int = 0
    bus: int = 0


_totals, _lock = Totals(), threading.Lock()
_open: list["Cost"] = []


def count_flops(number: float, device: str = "cpu") -> None:
    """Add FLOPs that a kind of device, `cpu` or `cuda`, has made."""
    with _lock:
        _totals.flops[device] = _totals.flops.get(device, 0.0) + number


def count_disk(size: int) -> None:
    """Add bytes that were read from files."""
    with _lock:
        _totals.disk += size


def count_bus(size: int) -> None:
    """Add bytes that were sent to an accelerator or fetched from it."""
    with _lock:
        _totals.bus += size


def count_move(tensor: Tensor, device: torch.device | str) -> None:
    """Add a tensor's bytes where going to `device` takes it over the bus."""
    if tensor.device.type != torch.device(device).type:
        count_bus(tensor.nbytes)


@contextmanager
def metered() -> Iterator[Cost]:
    """Measure what happens within the context; the cost is filled in at its end.

    Contexts may lie within one another: sums are of all that happens, peaks leave out what happens in the contexts within.
    """
    _note_peaks()  # of the contexts around this one, before the peaks begin anew
    _forget_peaks()
    before, begun = totals(), time.perf_counter()
    cost = Cost(began=resident_memory())
    _open.append(cost)
    try:
        yield cost
    finally:
        _note_peaks()
        _forget_peaks()  # so that the context around begins anew
        _open.pop()
        after = totals()
        spent = {device: total - before.flops.get(device, 0.0) for device, total in after.flops.items()}
        cost.flops = {device: number for device, number in spent.items() if number}
        cost.disk, cost.bus = after.disk - before.disk, after.bus - before.bus
        cost.seconds = round(time.perf_counter() - begun, 3)


def totals() -> Totals:
    """Return what has been counted since the program began."""
    with _lock:
        return Totals(dict(_totals.flops), _totals.disk, _totals.bus)


def _note_peaks() -> None:
    memory, gpu = peak_memory(), torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    if _open:
        cost = _open[-1]
        cost.memory, cost.gpu_memory = max(cost.memory, memory), max(cost.gpu_memory, gpu)


def resident_memory() -> int:
    """Return the bytes of main memory that this process holds."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Return the most resident memory since the peak was last forgotten; what is held now where the system keeps no peak."""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(row for row in rows if row.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return resident_memory()


def _forget_peaks() -> None:
    # where another system or a container forbids it, the peak is that of the program so far
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
