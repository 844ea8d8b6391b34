"""Weights in the GEMM layout of AWQ checkpoints (AutoAWQ): four-bit integers packed along the output, in an order of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.bits import unpack_bits
from moe2dense.weights.formats.packed_weight import PackedWeight

BITS = 4
# where in its word the value of each of eight neighbouring columns lies, in steps of four bits
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqWeight(PackedWeight):
    """tensors: codes [C, R / 8] int32, zero points [G, R / 8] int32, scales [G, R]. group: columns that share a scale; -1: all."""

    group: int

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return [R, C]."""
        columns, packed = checkpoint[self.codes].shape
        return packed * 32 // BITS, columns

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for tensors that do not fit each other."""
        rows, columns = self.shape(checkpoint)
        _, zeros, scales = self.tensors
        count = 1 if self.group <= 0 else -(-columns // self.group)
        self.require(checkpoint, scales, [(count, rows)], f"one for each group of {self.group} columns")
        self.require(checkpoint, zeros, [(count, rows * BITS // 32)], f"{BITS} bits for each scale")

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the weight, and of it rows [start, stop)."""
        packed, zeros, scales = (checkpoint.read(name) for name in self.tensors)
        group = self.group if self.group > 0 else len(packed)
        index = torch.arange(len(packed)) // group
        values = (_unpack(packed) - _unpack(zeros)[index]).float() * scales.float()[index]
        return values.T[start:stop]


def _unpack(packed: Tensor) -> Tensor:
    """Unpack words [N, R / 8] -> values [N, R] in the order of the output."""
    count = packed.shape[1] * 32 // BITS
    ordered = unpack_bits(packed, BITS, count).view(len(packed), -1, len(_PLACES))
    return ordered[..., list(_PLACES)].reshape(len(packed), count)
