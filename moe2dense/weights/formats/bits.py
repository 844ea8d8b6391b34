"""Unpack integers of few bits from 32-bit words, and four-bit floats from bytes."""

import torch
from torch import Tensor

# The sixteen values of FP4 E2M1, by code: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats v1.0).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack int32 words [.., W] -> the first `count` values [.., count] int32, each in [0, 2^bits).

    Value i lies at bit i * bits, counted from the lowest bit of the first word; it may reach into the next word.
    """
    assert packed.dtype == torch.int32, packed.dtype
    if 8 % bits == 0:  # no value reaches from one byte into the next
        octets = packed.reshape(-1).view(torch.uint8).view(*packed.shape[:-1], 4 * packed.shape[-1])
        values = torch.stack([octets >> shift for shift in range(0, 8, bits)], -1).flatten(-2)
        return (values[..., :count] & ((1 << bits) - 1)).int()
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    # signed words are widened to 64 bits and cut to their 32, so that no sign is shifted in
    wide = packed.long() & 0xFFFFFFFF
    following = torch.clamp(word + 1, max=packed.shape[-1] - 1)
    pair = wide[..., word] | (wide[..., following] << 32)
    return ((pair >> shift) & ((1 << bits) - 1)).int()


def unpack_fp4(packed: Tensor) -> Tensor:
    """Unpack bytes [.., C / 2] uint8 of two FP4 codes each, low nibble first -> float32 [.., C]."""
    table = torch.tensor(FP4_VALUES)
    return torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(-2)
