"""Measure what this machine can do, or take another one's numbers, for the times of a plan."""

import os
import time
from pathlib import Path

import torch

from moe2dense.common.units import parse_bytes, parse_count
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.results import Machine
from moe2dense.errors import UserError
from moe2dense.families.resolve import resolve_teacher

_UNKNOWN_DISK = 1e9  # bytes/s of a teacher that is not on this disk yet
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks. Raises UserError."""
    if device not in ("auto", "cpu") and torch.device(_kind(device)).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is available here; use --device cpu, or auto")


def _kind(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda; found {device!r}")
    return device


def machine_to_plan_for(settings: RunConfig, speed: str | None = None, disk_speed: str | None = None) -> Machine:
    """Return the machine that a plan's times are for: the one described by `speed` and `disk_speed`, else this one, measured.

    speed: FLOP/s, such as 300t; disk_speed: bytes a second, such as 3GB. Raises UserError.
    """
    if speed is None:
        check_device(settings.teacher.device)
        own = calibrate(resolve_teacher(settings.model, settings.teacher.card).path, device=settings.teacher.device)
    else:
        own = Machine(parse_count(speed, "--speed"), _UNKNOWN_DISK, "the machine of --speed")
    disk = own.disk if disk_speed is None else parse_bytes(disk_speed, "--disk-speed")
    if own.flops <= 0 or disk <= 0:
        raise UserError("--speed and --disk-speed must be above 0")
    return Machine(own.flops, disk, own.name, own.disk_measured and disk_speed is None)


def calibrate(path: Path | None, seconds: float = 2.0, device: str = "auto") -> Machine:
    """Measure fp32 matrix products on the device and, where the teacher is on this disk, uncached sequential reads."""
    place = torch.device(_kind(device))
    flops = _measure_products(place, seconds / 2)
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
    else:
        threads = torch.get_num_threads()
        name = f"this machine's CPU ({threads} thread{'s' if threads > 1 else ''})"
    found = [*path.glob("*.safetensors"), *path.glob("*.gguf")] if path else []
    files = sorted(found, key=lambda p: -p.stat().st_size)
    if not files:
        return Machine(flops, _UNKNOWN_DISK, name)
    return Machine(flops, _measure_reads(files[0], seconds / 2), name, disk_measured=True)


def _measure_products(place: torch.device, seconds: float) -> float:
    """FLOP/s of square fp32 matrix products."""
    side = _SIDE[place.type]
    a = torch.randn(side, side, device=place)
    _ = (a @ a)[0, 0].item()  # .item() waits for a GPU
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        _ = (a @ a)[0, 0].item()
        products += 1
    return 2 * side**3 * products / (time.perf_counter() - start)


def _measure_reads(file: Path, seconds: float) -> float:
    """Bytes/s read from a file that is dropped from the page cache first, where the system can do that."""
    handle = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start, size = time.perf_counter(), 0
        while time.perf_counter() - start < seconds and (chunk := os.read(handle, 1 << 22)):
            size += len(chunk)
        return size / max(time.perf_counter() - start, 1e-6)
    finally:
        os.close(handle)
