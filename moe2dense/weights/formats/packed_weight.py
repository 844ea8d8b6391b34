"""A weight that is stored as other tensors than itself: codes, scales, zero points."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class PackedWeight(ABC):
    """One weight as a format packs it, read as float32."""

    key: str  # the tensor's name if it were not packed
    tensors: tuple[str, ...]  # the stored tensors that it is read from, its codes first

    @property
    def codes(self) -> str:
        """Return the tensor that holds the packed values."""
        return self.tensors[0]

    @abstractmethod
    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the shape once unpacked."""

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError where a tensor is missing, or has a shape or dtype that cannot be unpacked. No weight is read."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read entries [start, stop) of the first axis, in float32."""

    def nbytes(self, checkpoint: Checkpoint, entry: bool = False) -> int:
        """Return the stored bytes, or those of one entry of the first axis (an expert of a stack)."""
        infos = [checkpoint[name] for name in self.tensors]
        return sum(info.row_bytes if entry else info.nbytes for info in infos)

    def require(self, checkpoint: Checkpoint, name: str, shapes: Sequence[tuple[int, ...]], why: str) -> None:
        """Raise UserError where tensor `name` has none of these shapes. why: what it must be one of each of."""
        info = checkpoint[name]
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise UserError(
                f"checkpoint file {info.file}: tensor {name!r} has shape {list(info.shape)}, unpacking {self.key!r} takes "
                f"{wanted} ({why}); correct quantization_config in config.json, or give a checkpoint that is not quantised"
            )


def words(values: int, bits: int) -> int:
    """Return how many 32-bit words hold so many values, packed without gaps."""
    return math.ceil(values * bits / 32)
