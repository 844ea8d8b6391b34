"""Weights in FP4 with a scale for each group of a row: NVFP4 (compressed-tensors, ModelOpt) and MXFP4 (compressed-tensors).

NVFP4 has FP8 scales for groups of 16 and one float32 scale for the tensor, which compressed-tensors divides by and ModelOpt multiplies
with. MXFP4 has exponents of two for groups of 32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.bits import unpack_fp4
from moe2dense.weights.formats.packed_weight import PackedWeight


@dataclass(frozen=True)
class Fp4Weight(PackedWeight):
    """tensors: codes [.., R, C / 2] uint8, scales [.., R, C / group], the tensor's scale where there is one.

    divided: the tensor's scale divides those of the groups.
    """

    scale: str
    tensor_scale: str
    group: int
    divided: bool = False

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return twice as many columns as there are bytes."""
        *rest, columns = checkpoint[self.codes].shape
        return (*rest, 2 * columns)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for scales that do not fit."""
        *rest, columns = self.shape(checkpoint)
        info = checkpoint[self.codes]
        if len(rest) != 1:
            raise UserError(
                f"checkpoint file {info.file}: tensor {info.name!r} is no matrix, and no other FP4 weight is read"
            )
        wanted = [(*rest, -(-columns // self.group))]
        self.require(checkpoint, self.scale, wanted, f"one for each {self.group} values")
        scale = checkpoint[self.scale]
        if scale.dtype not in (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu):
            dtype = str(scale.dtype).removeprefix("torch.")
            raise UserError(f"checkpoint file {scale.file}: the scales {self.scale!r} have dtype {dtype}")
        if self.tensor_scale:
            self.require(checkpoint, self.tensor_scale, [(), (1,)], "one for the tensor")

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) and no others."""
        codes, stored = (checkpoint.read(name, start, stop) for name in (self.codes, self.scale))
        scales = (
            torch.ldexp(torch.ones(stored.shape), stored.int() - 127) if stored.dtype == torch.uint8 else stored.float()
        )
        if self.tensor_scale:
            whole = checkpoint.read(self.tensor_scale).float()
            scales = scales / whole if self.divided else scales * whole
        values = unpack_fp4(codes)
        return values * scales.repeat_interleave(self.group, -1)[..., : values.shape[-1]]
