"""Read a model's parameters from checkpoint bytes: which tensors make one, how they are unpacked, one expert at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.modeling.internals import KeyMap, Source, convert
from moe2dense.weights import bitsandbytes
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.packed import Block, unpack_fp8, unpack_mxfp4


@dataclass(frozen=True)
class Layout:
    """How an experts module keeps its matrices: transposed [in, out], gate and up rows interleaved."""

    transposed: bool
    interleaved: bool


def fp8_block(quantization: dict[str, Any] | None) -> Block | None:
    """Return the block of weights that shares a scale, as the config says; None where it says that there are no blocks."""
    size = (quantization or {}).get("weight_block_size", (128, 128))
    return (int(size[0]), int(size[1])) if size else None


class Weights:
    """The parameters of a model, read from a checkpoint by the model's own names.

    `expert(...)` returns one expert's matrices in plain orientation and stored dtype; nothing else of the layer is read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        key_map: KeyMap,
        model: PreTrainedModel,
        quantization: dict[str, Any] | None = None,
    ):
        self.checkpoint, self.map, self.model = checkpoint, key_map, model
        self.block = fp8_block(quantization)

    def _read(self, source: Source, expert: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """Read one source, unpacked, or one expert of it; into `buffer` where it is not packed. Raises UserError for other dtypes."""
        span = (0, None) if expert is None else (expert, expert + 1)
        if source.from_bitsandbytes:
            return bitsandbytes.read_weight(self.checkpoint, source.key)
        packed = source.scale != ""
        raw = self.checkpoint.read(source.key, *span, buffer=None if packed else buffer)
        if packed:
            scale = self._read_scale(source, span)
            raw = unpack_mxfp4(raw, scale) if raw.dtype == torch.uint8 else unpack_fp8(raw, scale, self.block)
        elif not raw.is_floating_point() or raw.dtype.itemsize == 1:
            info = self.checkpoint[source.key]
            raise UserError(
                f"checkpoint file {info.file}: tensor {source.key!r} has dtype {str(raw.dtype).removeprefix('torch.')}, "
                "which is not a weight that can be read as it is"
            )
        return raw if expert is None else raw[0]

    def _read_scale(self, source: Source, span: tuple[int, int | None]) -> Tensor:
        """Read the scales of these experts of a stack; all of them where one is shared by the whole stack."""
        weight, scale = self.checkpoint[source.key].shape, self.checkpoint[source.scale].shape
        shared = not scale or scale[0] != weight[0]
        return self.checkpoint.read(source.scale) if shared else self.checkpoint.read(source.scale, *span)

    def source_bytes(self, source: Source, expert: bool = False) -> int:
        """Return the stored bytes of one source, or of one expert's share of it."""
        names = [source.key, *([source.scale] if source.scale else [])]
        infos = [self.checkpoint[n] for n in names]
        return sum(i.row_bytes if expert and source.expert is None else i.nbytes for i in infos)

    def parameter(self, name: str) -> Tensor:
        """Read parameter `name` in its stored dtype (float32 where it was packed); experts are stacked as the model keeps them.

        Raises UserError where the checkpoint has no tensor for it.
        """
        sources = self.map.sources.get(name)
        if not sources:
            raise UserError(f"checkpoint {self.checkpoint.folder}: no tensor for parameter {name!r}")
        if name in self.map.converters:
            return convert(self.map, self.model, name, {s.key: self._read(s) for s in sources})
        if sources[0].expert is None:
            value = self._read(sources[0])
            return value.mT if self._blocks_are_rows(sources[0]) else value
        by_part = [
            torch.stack(
                [self._read(s) for s in sorted((s for s in sources if s.part == p), key=lambda s: s.expert or 0)]
            )
            for p in range(sources[0].parts)
        ]
        return by_part[0] if len(by_part) == 1 else torch.cat(by_part, 1)

    def _blocks_are_rows(self, source: Source) -> bool:
        """Return whether a source is MXFP4, which packs the input dimension last, whatever the module's orientation."""
        mxfp4 = source.scale != "" and not source.from_bitsandbytes
        return mxfp4 and self.checkpoint[source.key].dtype == torch.uint8

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a plain parameter, such as an embedding table."""
        source = self.map.sources[name][0]
        if source.scale or name in self.map.converters:
            return self.parameter(name)[start:stop]
        return self.checkpoint.read(source.key, start, stop)

    def expert_sources(self, name: str, expert: int) -> list[Source]:
        """Return what expert `expert` of parameter `name` is read from, in order of part."""
        sources = self.map.sources.get(name, [])
        mine = [s for s in sources if s.expert in (None, expert)]
        return sorted(mine, key=lambda s: s.part)

    def gate_up(self, name: str, expert: int, layout: Layout, buffer: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read (gate [F, H], up [F, H]) of one expert; both are views of what was read."""
        sources = self.expert_sources(name, expert)
        if len(sources) == 2:
            first = None if buffer is None else buffer[: self.source_bytes(sources[0])]
            second = None if buffer is None else buffer[self.source_bytes(sources[0]) :]
            return self._read(sources[0], None, first), self._read(sources[1], None, second)
        both = self._matrix(sources[0], expert, layout.transposed, buffer)
        if layout.interleaved:
            return both[0::2], both[1::2]
        return both.chunk(2)  # type: ignore[return-value]

    def down(self, name: str, expert: int, layout: Layout, buffer: Tensor | None = None) -> Tensor:
        """Read down [H, F] of one expert."""
        return self._matrix(self.expert_sources(name, expert)[0], expert, layout.transposed, buffer)

    def _matrix(self, source: Source, expert: int, transposed: bool, buffer: Tensor | None) -> Tensor:
        """Read one expert's matrix in plain orientation [out, in]."""
        value = self._read(source, None if source.expert is not None else expert, buffer)
        return value.mT if transposed and not self._blocks_are_rows(source) else value

    def bias(self, name: str, expert: int) -> Tensor | None:
        """Read one expert's row of a bias parameter; None where the family has none."""
        sources = self.expert_sources(name, expert)
        if not sources:
            return None
        return self._read(sources[0], None if sources[0].expert is not None else expert)


def assign(root: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` where parameter or buffer `name` of `root` is."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path) if path else root
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
