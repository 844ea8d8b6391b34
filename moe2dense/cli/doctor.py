"""`moe2dense doctor`: versions, devices, optional backends and why each is off."""

import shutil
from typing import Any

from moe2dense.common.versions import installed_version, versions

# package, what it gives, how to get it
OPTIONAL = (
    ("megablocks", "dropless MoE kernels for a resident teacher (--experts megablocks)", "pip install 'moe2dense[megablocks]' (needs a GPU and the torch it pins)"),
    ("gguf", "--format gguf", "pip install 'moe2dense[gguf]'"),
    ("lm_eval", "eval --tasks", "pip install 'moe2dense[eval]'"),
    ("tensorboard", "--report-to tensorboard", "pip install 'moe2dense[trackers]'"),
    ("trackio", "--report-to trackio", "pip install 'moe2dense[trackers]'"),
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Everything `doctor` prints, as plain values."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    backends = {"streamed": "on: any device", "grouped_mm": "on: teachers that fit the memory budget"}
    optional = {}
    for package, use, remedy in OPTIONAL:
        found = installed_version(package)
        optional[package] = f"{found}: {use}" if found else f"off, not installed: {use}; {remedy}"
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
        "optional": optional,
    }


def doctor(*, json: bool = False) -> None:
    """Show versions, devices, and which optional parts are on or why they are off.

    Parameters
    ----------
    json: print JSON instead of a table
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from moe2dense.common.units import show_bytes

    console, found = Console(), examine()
    if json:
        console.print_json(data=found)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for package, number in found["versions"].items():
        table.add_row(package, number)
    for device in found["devices"]:
        table.add_row("device", device)
    table.add_row("cuda", found["cuda"])
    memory = found["memory_bytes"]
    table.add_row("memory", f"{show_bytes(memory['available'])} free of {show_bytes(memory['total'])}")
    table.add_row("disk", f"{show_bytes(found['disk_free_bytes'])} free here")
    for name, state in found["experts"].items():
        table.add_row(f"experts {name}", escape(state))
    for name, state in found["optional"].items():
        if name not in found["experts"]:
            table.add_row(name, escape(state))
    console.print(table, highlight=False)
