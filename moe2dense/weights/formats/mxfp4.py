"""Stacks of experts in MXFP4, as gpt-oss stores them: FP4 codes and an exponent for each 32 of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.bits import unpack_fp4
from moe2dense.weights.formats.packed_weight import PackedWeight


@dataclass(frozen=True)
class Mxfp4Stack(PackedWeight):
    """tensors: blocks [E, R, G, 16] and exponents [E, R, G], both uint8. The input lies last, and modules keep it first."""

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return [E, in, out]."""
        *stack, rows, groups, half = checkpoint[self.codes].shape
        return (*stack, groups * half * 2, rows)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for exponents that are not one for each 32 values."""
        info, scale = checkpoint[self.codes], checkpoint[self.tensors[1]]
        if scale.shape != info.shape[:-1] or info.shape[-1:] != (16,):
            raise UserError(
                f"checkpoint file {scale.file}: the scales {scale.name!r} have shape {list(scale.shape)}, which does not fit "
                f"{info.name!r} of shape {list(info.shape)} (one for each 32 values, {list(info.shape[:-1])}); give a checkpoint "
                f"that is not quantised"
            )
        for part in (info, scale):
            if part.dtype != torch.uint8:
                dtype = str(part.dtype).removeprefix("torch.")
                raise UserError(
                    f"checkpoint file {part.file}: tensor {part.name!r} has dtype {dtype}, MXFP4 takes uint8"
                )

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read experts [start, stop) -> [e, in, out]."""
        codes, exponents = (checkpoint.read(name, start, stop) for name in self.tensors)
        return unpack_mxfp4(codes, exponents).mT


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Unpack MXFP4: two FP4 codes a byte, low nibble first, and an 8-bit exponent (bias 127) for each 32 values.

    blocks [.., R, G, 16] uint8 and scales [.., R, G] uint8 -> float32 [.., R, G * 32].
    """
    return torch.ldexp(unpack_fp4(blocks), scales.int().sub(127).unsqueeze(-1)).flatten(-2)
