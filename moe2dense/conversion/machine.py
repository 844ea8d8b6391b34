"""What this machine can do: memory, disk and measured speed, for the plan."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """What a two-second calibration measured: FLOP/s of fp32 products and bytes/s read from the disk."""

    flops: float
    disk: float


def calibrate(path: Path | None, seconds: float = 2.0) -> Machine:
    """Measure fp32 matrix products and, where the teacher is on this disk, uncached sequential reads."""
    import os
    import time

    import torch

    a = torch.randn(1024, 1024)
    _ = a @ a
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds / 2:
        _ = a @ a
        done += 1
    flops = 2 * 1024**3 * done / (time.perf_counter() - start)
    files = sorted(path.glob("*.safetensors"), key=lambda p: -p.stat().st_size) if path else []
    if not files:
        return Machine(flops, 1e9)
    handle = os.open(files[0], os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start, got = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 2 and (chunk := os.read(handle, 1 << 22)):
            got += len(chunk)
        return Machine(flops, got / max(time.perf_counter() - start, 1e-6))
    finally:
        os.close(handle)
