"""Unpack weights stored as FP8 with scales or as MXFP4."""

import torch
from torch import Tensor

# The sixteen values of FP4 E2M1, by code: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats v1.0).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Unpack FP8 with one scale per block of weights (DeepSeek-V3): [.., R, C] and [.., ceil(R/b0), ceil(C/b1)] -> float32 [.., R, C]."""
    rows, columns = weight.shape[-2:]
    wide = scale.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return weight.float() * wide.repeat_interleave(block[1], -1)[..., :columns]


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Unpack MXFP4: two FP4 codes a byte, low nibble first, and an 8-bit exponent (bias 127) for each 32 values.

    blocks [.., R, G, 16] uint8 and scales [.., R, G] uint8 -> float32 [.., R, G * 32].
    """
    table = torch.tensor(FP4_VALUES)
    values = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    return torch.ldexp(values, scales.int().sub(127).unsqueeze(-1)).flatten(-2)
