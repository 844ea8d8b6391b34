"""Look at what this machine has: versions, devices, memory, and optional packages."""

import shutil
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils._triton import has_triton

from moe2dense.common.units import show_bytes
from moe2dense.common.versions import installed_version, versions


@dataclass(frozen=True)
class OptionalPackage:
    """A package that moe2dense works without, what it gives and how to get it."""

    name: str
    use: str
    remedy: str


OPTIONAL = (
    OptionalPackage(
        "megablocks",
        "dropless MoE kernels for a resident teacher (--experts megablocks)",
        "pip install 'moe2dense[megablocks]' (needs a GPU and the torch it pins)",
    ),
    OptionalPackage("gguf", "--format gguf", "pip install 'moe2dense[gguf]'"),
    OptionalPackage("lm_eval", "eval --tasks", "pip install 'moe2dense[eval]'"),
    OptionalPackage("tensorboard", "--report-to tensorboard", "pip install 'moe2dense[trackers]'"),
    OptionalPackage("trackio", "--report-to trackio", "pip install 'moe2dense[trackers]'"),
)


def examine() -> dict[str, Any]:
    """Return everything `doctor` prints, as plain values."""
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    backends = {"streamed": "on: any device", "grouped_mm": "on: teachers that fit the memory budget"}
    optional = {}
    for package in OPTIONAL:
        version = installed_version(package.name)
        missing = f"off, not installed: {package.use}; {package.remedy}"
        optional[package.name] = f"{version}: {package.use}" if version else missing
    if installed_version("megablocks") and not cuda:
        optional["megablocks"] = "off: it needs a CUDA device, and there is none here"
    backends["megablocks"] = optional["megablocks"]
    memory = psutil.virtual_memory()
    return {
        "versions": versions(),
        "devices": devices or [f"cpu ({torch.get_num_threads()} threads)"],
        "cuda": torch.version.cuda if cuda else "no CUDA device found",
        "memory_bytes": {"total": memory.total, "available": memory.available},
        "disk_free_bytes": shutil.disk_usage(".").free,
        "experts": backends,
        "attention": {"sdpa": "on: any device", "flex": _flex(cuda)},
        "optional": optional,
    }


def _flex(cuda: bool) -> str:
    """Return whether models can attend through tiles here, and how."""
    if not cuda:
        return "on where asked for (--attention flex), some queries at a time; no kernel for it on a CPU"
    return "on: kernels that torch compiles" if has_triton() else "off: it needs triton, which is not installed"


def print_examination(as_json: bool = False) -> None:
    """Print what `examine` returns as a table or as JSON."""
    console, examination = Console(), examine()
    if as_json:
        console.print_json(data=examination)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for package, number in examination["versions"].items():
        table.add_row(package, number)
    for device in examination["devices"]:
        table.add_row("device", device)
    table.add_row("cuda", examination["cuda"])
    memory = examination["memory_bytes"]
    table.add_row("memory", f"{show_bytes(memory['available'])} free of {show_bytes(memory['total'])}")
    table.add_row("disk", f"{show_bytes(examination['disk_free_bytes'])} free here")
    for name, state in examination["experts"].items():
        table.add_row(f"experts {name}", escape(state))
    for name, state in examination["attention"].items():
        table.add_row(f"attention {name}", escape(state))
    for name, state in examination["optional"].items():
        if name not in examination["experts"]:
            table.add_row(name, escape(state))
    console.print(table, highlight=False)
