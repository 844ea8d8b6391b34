"""Count what a run does on which device: FLOPs, bytes over the bus, and waits of the host for the accelerator."""

import collections
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import flop_registry

PACKAGE = str(Path(__file__).parents[2] / "moe2dense") + "/"
# matrix factorisations, which torch's registry leaves out: FLOPs by the number of rows of their first argument
_FACTORISATIONS = {
    "linalg_cholesky_ex": lambda n: n**3 / 3,
    "cholesky_inverse": lambda n: 2 * n**3 / 3,
    "linalg_eigh": lambda n: 9 * n**3,
    "_linalg_eigh": lambda n: 9 * n**3,
    "linalg_solve_ex": lambda n: 2 * n**3 / 3,
    "_linalg_solve_ex": lambda n: 2 * n**3 / 3,
}


@dataclass
class Counts:
    """Sums of a run. A place is the innermost line of the package at work, such as `student/ffn/refit.py:40`."""

    # (device type, place) -> FLOPs of matrix products and factorisations
    flops: collections.Counter = field(default_factory=collections.Counter)
    # ("to cuda" or "to cpu", place) -> bytes
    moved: collections.Counter = field(default_factory=collections.Counter)
    # place -> how often the host waited for a value
    waits: collections.Counter = field(default_factory=collections.Counter)

    def on(self, device: str) -> float:
        """Return the FLOPs of all places on a type of device."""
        return sum(n for (where, _), n in self.flops.items() if where == device)

    @property
    def cpu_share(self) -> float:
        """The share of all FLOPs that the CPU did."""
        return self.on("cpu") / max(1.0, self.on("cpu") + self.on("cuda"))

    def add_product(self, device: str, operation: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Add the FLOPs of an operation, where it is a matrix product or a factorisation."""
        name = operation.__name__
        if operation in flop_registry:
            self.flops[device, place()] += flop_registry[operation](*args, **kwargs, out_val=output)
        elif name in _FACTORISATIONS:
            self.flops[device, place()] += int(_FACTORISATIONS[name](args[0].shape[-1]))
        elif name in ("cholesky_solve", "linalg_solve_triangular", "triangular_solve"):
            *_, rows, columns = args[0].shape if name == "cholesky_solve" else args[1].shape
            self.flops[device, place()] += (2 if name == "cholesky_solve" else 1) * rows * rows * columns

    def largest(self, device: str, count: int = 12) -> list[str]:
        """Return the places of a device with most FLOPs, as lines to read."""
        rows = [(n, where) for (kind, where), n in self.flops.items() if kind == device]
        return [f"{n / 1e9:10.3f} GFLOP  {where}" for n, where in sorted(rows, reverse=True)[:count]]


def place() -> str:
    """Return the innermost line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
