"""Weights in the layout of GPTQ checkpoints (AutoGPTQ, GPTQModel): integers packed along the input, zero points along the output.

A weight is (code - zero point) * scale. The older layout (`gptq`) stores zero points less one, the newer (`gptq_v2`) as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.bits import unpack_bits
from moe2dense.weights.formats.packed_weight import PackedWeight, words


@dataclass(frozen=True)
class GptqWeight(PackedWeight):
    """tensors: codes [ceil(C * bits / 32), R], zero points [G, ceil(R * bits / 32)], scales [G, R], each column's group [C] where it is there."""

    bits: int
    group: int  # columns that share a scale; -1: all
    groups: str = ""  # the tensor with each column's group
    minus_one: bool = True  # zero points are stored less one

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return [R, C]."""
        packed, rows = checkpoint[self.codes].shape
        columns = checkpoint[self.groups].shape[0] if self.groups else packed * 32 // self.bits
        return rows, columns

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for tensors that do not fit each other."""
        rows, columns = self.shape(checkpoint)
        _, zeros, scales = self.tensors[:3]
        count = 1 if self.group <= 0 else -(-columns // self.group)
        if self.groups and len(checkpoint[scales].shape) == 2:  # some modules may have other groups than the rest
            count = checkpoint[scales].shape[0]
        self.require(checkpoint, self.codes, [(words(columns, self.bits), rows)], f"{self.bits} bits a value")
        self.require(checkpoint, scales, [(count, rows)], "one for each group of columns")
        self.require(checkpoint, zeros, [(count, words(rows, self.bits))], f"{self.bits} bits for each scale")

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the weight, and of it rows [start, stop)."""
        rows, columns = self.shape(checkpoint)
        packed, zeros, scales = (checkpoint.read(name) for name in self.tensors[:3])
        codes = unpack_bits(packed.T, self.bits, columns)  # [R, C]
        offsets = unpack_bits(zeros, self.bits, rows)  # [G, R]
        if self.minus_one:
            offsets = (offsets + 1) & ((1 << self.bits) - 1)
        if self.groups:
            index = checkpoint.read(self.groups).long()
        else:
            index = torch.arange(columns) // (self.group if self.group > 0 else columns)
        return ((codes - offsets[index].T).float() * scales.float()[index].T)[start:stop]
