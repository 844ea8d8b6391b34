"""Weights as integers in the compressed-tensors layout: packed into 32-bit words (INT4 and others up to 8 bits), or as int8.

A weight is (code - zero point) * scale. Scales stand for the tensor, each row, each group of a row, or each block. Layout: the
documentation and source of compressed-tensors, `pack-quantized` and `int-quantized`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.bits import unpack_bits
from moe2dense.weights.formats.fp8 import scale_grid
from moe2dense.weights.formats.packed_weight import PackedWeight, words
from moe2dense.weights.formats.settings import Block


@dataclass(frozen=True)
class _Integers(PackedWeight):
    """What both forms share. block: rows and columns that share a scale; symmetric: zero points are left out."""

    scale: str
    zero_point: str
    block: Block | None
    symmetric: bool

    def _scaled(self, checkpoint: Checkpoint, codes: Tensor, zeros: Tensor | None) -> Tensor:
        """Return (codes - zeros) * scales for codes [R, C] and zeros of the scales' shape -> float32 [R, C]."""
        scales = checkpoint.read(self.scale).float()
        values = codes.float()
        if zeros is not None:
            values = values - _spread(zeros.float().reshape(scales.shape), values.shape, self.block)
        return values * _spread(scales, values.shape, self.block)

    def check_scales(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for scales or zero points that do not fit."""
        shape, scales = self.shape(checkpoint), checkpoint[self.scale]
        if scale_grid(shape, scales.shape, self.block) is None:
            block = f" of {self.block[0]} x {self.block[1]}" if self.block else ""
            raise UserError(
                f"checkpoint file {scales.file}: the scales {self.scale!r} have shape {list(scales.shape)}, which does not fit "
                f"{self.key!r} of shape {list(shape)} (one for the tensor, for each row, or for each group or block{block}); correct "
                f"quantization_config in config.json, or give a checkpoint that is not quantised"
            )
        if not self.symmetric and not self.zero_point:
            raise UserError(
                f"checkpoint file {scales.file}: {self.key!r} has no zero points beside it, and config.json says that its "
                f"quantisation is not symmetric; download it again"
            )


def _spread(values: Tensor, shape: torch.Size, block: Block | None) -> Tensor:
    """Return one value for each weight [R, C] from those of tensors, rows, groups or blocks."""
    layout = scale_grid(shape, values.shape, block)
    assert layout is not None, "shapes are checked before anything is read"
    grid, (height, width) = layout
    rows = values.reshape(grid).repeat_interleave(height, -2)[: shape[0]]
    return rows.repeat_interleave(width, -1)[:, : shape[1]]


@dataclass(frozen=True)
class PackedIntegers(_Integers):
    """tensors: words [R, ceil(C * bits / 32)] int32, scales, `weight_shape` where it is there, zero points where they are."""

    bits: int
    stored_shape: str = ""

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return what `weight_shape` holds; without it, what the words hold."""
        if self.stored_shape:
            return tuple(int(n) for n in checkpoint.read(self.stored_shape).tolist())
        rows, columns = checkpoint[self.codes].shape
        return rows, columns * 32 // self.bits

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for words, scales or zero points that do not fit."""
        rows, columns = self.shape(checkpoint)
        self.require(checkpoint, self.codes, [(rows, words(columns, self.bits))], f"{self.bits} bits a value")
        self.check_scales(checkpoint)
        if self.zero_point:
            scales = checkpoint[self.scale].shape
            wanted = (words(rows, self.bits), scales[-1])
            self.require(checkpoint, self.zero_point, [wanted], f"{self.bits} bits for each scale")

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the weight, and of it rows [start, stop)."""
        rows, columns = self.shape(checkpoint)
        offset = 1 << (self.bits - 1)
        codes = unpack_bits(checkpoint.read(self.codes), self.bits, columns) - offset
        zeros = None
        if self.zero_point:  # packed along the rows
            zeros = unpack_bits(checkpoint.read(self.zero_point).T, self.bits, rows).T - offset
        return self._scaled(checkpoint, codes, zeros)[start:stop]


@dataclass(frozen=True)
class Int8Weight(_Integers):
    """tensors: codes [R, C] int8, scales, zero points (int8) where they are there."""

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the shape, which packing does not change."""
        return checkpoint[self.codes].shape

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for scales or zero points that do not fit."""
        if len(self.shape(checkpoint)) != 2:
            info = checkpoint[self.codes]
            raise UserError(
                f"checkpoint file {info.file}: tensor {info.name!r} is no matrix, and no other int8 weight is read"
            )
        self.check_scales(checkpoint)
        if self.zero_point:
            self.require(checkpoint, self.zero_point, [checkpoint[self.scale].shape], "one for each scale")

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the weight, and of it rows [start, stop)."""
        zeros = checkpoint.read(self.zero_point) if self.zero_point else None
        return self._scaled(checkpoint, checkpoint.read(self.codes), zeros)[start:stop]
