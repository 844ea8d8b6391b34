"""Unpack weights stored as FP8 with scales or as MXFP4."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The sixteen values of FP4 E2M1, by code: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats v1.0).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


Block = tuple[int, int]  # rows and columns of a weight that share a scale


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


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Unpack MXFP4: two FP4 codes a byte, low nibble first, and an 8-bit exponent (bias 127) for each 32 values.

    blocks [.., R, G, 16] uint8 and scales [.., R, G] uint8 -> float32 [.., R, G * 32].
    """
    table = torch.tensor(FP4_VALUES)
    values = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    return torch.ldexp(values, scales.int().sub(127).unsqueeze(-1)).flatten(-2)
