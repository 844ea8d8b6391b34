"""Weights in FP8 with scales: of a tensor, of each row, of each group of a row, or of each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.packed_weight import PackedWeight
from moe2dense.weights.formats.settings import Block

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scale_grid(
    weight: Sequence[int], scale: Sequence[int], block: Block | None
) -> tuple[tuple[int, ...], Block] | None:
    """Return how the scales of an FP8 weight are laid out: (their shape as a grid [.., rows, columns], the block that shares one).

    weight: shape [.., R, C]. scale: its shape; one for the whole weight, for each matrix of a stack [..], for each row [.., R] or
    [.., R, 1], or for each block [.., ceil(R/b0), ceil(C/b1)]. Without a block size any grid that divides the weight evenly is taken,
    as transformers does. None where the two do not fit.
    """
    if len(weight) < 2:
        return ((1,) * len(weight), (1, 1)) if set(scale) <= {1} else None
    stack, (rows, columns) = tuple(weight[:-2]), tuple(weight[-2:])
    scale, whole = tuple(scale), (rows, columns)
    if set(scale) <= {1}:  # one for all
        return (1,) * len(weight), whole
    if scale == stack or (stack and scale == (*stack, 1, 1)):
        return (*stack, 1, 1), whole
    if scale in ((*stack, rows), (*stack, rows, 1)):
        return (*stack, rows, 1), (1, columns)
    if len(scale) != len(weight) or scale[:-2] != stack:
        return None
    if block is not None:
        return (scale, block) if scale[-2:] == (-(-rows // block[0]), -(-columns // block[1])) else None
    if rows % scale[-2] or columns % scale[-1]:
        return None
    return scale, (rows // scale[-2], columns // scale[-1])


def unpack_fp8(weight: Tensor, scale: Tensor, block: Block | None) -> Tensor:
    """Unpack FP8 [.., R, C] with the scales that `scale_grid` describes -> float32 [.., R, C].

    Scales in uint8 are exponents of two with a bias of 127 (E8M0). Raises ValueError for scales that do not fit.
    """
    layout = scale_grid(weight.shape, scale.shape, block)
    if layout is None:
        raise ValueError(f"scales of shape {list(scale.shape)} do not fit a weight of shape {list(weight.shape)}")
    grid, (height, width) = layout
    factors = torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()
    factors = factors.reshape(grid)
    if factors.numel() == 1 or weight.ndim < 2:
        return weight.float() * factors
    rows, columns = weight.shape[-2:]
    wide = factors.repeat_interleave(height, -2)[..., :rows, :]
    return weight.float() * wide.repeat_interleave(width, -1)[..., :columns]


@dataclass(frozen=True)
class Fp8Weight(PackedWeight):
    """tensors: the weight, its scales. block: the rows and columns that share a scale, where config.json says so."""

    block: Block | None = None

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the shape, which packing does not change."""
        return checkpoint[self.codes].shape

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for scales that are not as many, or not of the dtype, that unpacking takes."""
        info, scale = checkpoint[self.codes], checkpoint[self.tensors[1]]
        if scale_grid(info.shape, scale.shape, self.block) is None:
            block = f" of {self.block[0]} x {self.block[1]}" if self.block else ""
            raise UserError(
                f"checkpoint file {scale.file}: the scales {scale.name!r} have shape {list(scale.shape)}, which does not fit "
                f"{info.name!r} of shape {list(info.shape)} (one for the tensor, for each row, or for each block{block}); correct "
                f"weight_block_size in config.json, or give a checkpoint that is not quantised"
            )
        if not scale.dtype.is_floating_point and scale.dtype != torch.uint8:
            dtype = str(scale.dtype).removeprefix("torch.")
            raise UserError(f"checkpoint file {scale.file}: the scales {scale.name!r} have dtype {dtype}")

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read matrices [start, stop) of a stack by themselves; rows of a single matrix out of all of it."""
        info, scales = checkpoint[self.codes], checkpoint[self.tensors[1]]
        if len(info.shape) < 3:
            whole = unpack_fp8(checkpoint.read(self.codes), checkpoint.read(scales.name), self.block)
            return whole[start:stop] if whole.dim() else whole
        shared = not scales.shape or scales.shape[0] != info.shape[0]
        factors = checkpoint.read(scales.name) if shared else checkpoint.read(scales.name, start, stop)
        return unpack_fp8(checkpoint.read(self.codes, start, stop), factors, self.block)
