"""Measure what this machine can do, or take another one's numbers, for the times of a plan."""

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from moe2dense.common.units import parse_bytes, parse_count
from moe2dense.config.schema import RunConfig
from moe2dense.errors import UserError
from moe2dense.families.machines import CPU, Machine, described_machine
from moe2dense.families.resolve import resolve_teacher

_UNKNOWN_DISK = 1e9  # bytes/s of a teacher that is not on this disk yet
_USUAL_BUS = 25e9  # bytes/s to a GPU, PCIe 4
_MEASURED_SHARE = 0.6  # of the measured speed of large products that a run reaches
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


def machine_to_plan_for(
    settings: RunConfig, speed: str | None = None, disk_speed: str | None = None, machine: str | None = None
) -> Machine:
    """Return the machine that a plan is for: a described one, or this one, measured; `speed` and `disk_speed` change its rates.

    machine: `1xh100`, the path of a TOML file, or `cpu` for this machine's. speed: FLOP/s, such as 300t; disk_speed: bytes a
    second, such as 3GB. Raises UserError.
    """
    device = settings.teacher.device
    if machine and machine != CPU:
        own = described_machine(machine)
    elif speed is None:
        device = CPU if machine == CPU else device
        check_device(device)
        own = calibrate(resolve_teacher(settings.model, settings.teacher.card).path, device=device)
    else:
        own = replace(_this_machine(), title="the machine of --speed")
    if speed is not None:
        rate = float(parse_count(speed, "--speed"))
        own = replace(own, half=rate, tf32=rate, single=rate, double=rate / 2, share=_MEASURED_SHARE, measured=())
    if disk_speed is not None:
        rest = tuple(m for m in own.measured if m != "disk")
        own = replace(own, disk=float(parse_bytes(disk_speed, "--disk-speed")), measured=rest)
    if own.single <= 0 or own.disk <= 0:
        raise UserError("--speed and --disk-speed must be above 0")
    return own


def _this_machine() -> Machine:
    """Return this machine's memory, without its speed."""
    total = float(psutil.virtual_memory().total)
    return Machine("this machine", 0.0, _UNKNOWN_DISK, memory=total, host_memory=total, share=_MEASURED_SHARE)


def calibrate(path: Path | None, seconds: float = 2.0, device: str = "auto") -> Machine:
    """Measure matrix products on the device and, where the teacher is on this disk, uncached sequential reads."""
    place, own = torch.device(_kind(device)), _this_machine()
    single = _measure_products(place, seconds / 2)
    if place.type == "cuda":
        name, memory = torch.cuda.get_device_name(place), float(torch.cuda.mem_get_info(place)[1])
        half = _measure_products(place, seconds / 2, torch.bfloat16)
        own = replace(own, title=name, device="cuda", half=half, memory=memory, bus=_USUAL_BUS)
    else:
        threads = torch.get_num_threads()
        own = replace(own, title=f"this machine's CPU ({threads} thread{'s' if threads > 1 else ''})")
    own = replace(own, single=single, measured=("products",))
    weights = [*path.glob("*.safetensors"), *path.glob("*.gguf")] if path else []
    files = sorted(weights, key=lambda p: -p.stat().st_size)
    if not files:
        return own
    return replace(own, disk=_measure_reads(files[0], seconds / 2), measured=("products", "disk"))


def _measure_products(place: torch.device, seconds: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the FLOP/s of square matrix products."""
    side = _SIDE[place.type]
    a = torch.randn(side, side, device=place, dtype=dtype)
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
