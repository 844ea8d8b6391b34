"""Read a model's parameters from checkpoint bytes: which tensors make one, how they are unpacked, one expert at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.modeling.internals import KeyMap, Source, convert, saved_tensors
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.finite import refuse_not_finite
from moe2dense.weights.formats.find import PackedWeights


@dataclass(frozen=True)
class Layout:
    """How an experts module keeps its matrices: transposed [in, out], gate and up rows interleaved."""

    transposed: bool
    interleaved: bool


class Weights:
    """The parameters of a model, read from a checkpoint by the model's own names.

    `expert(...)` returns one expert's matrices in plain orientation and stored dtype; nothing else of the layer is read.
    """

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap, model: PreTrainedModel, packed: PackedWeights):
        self.checkpoint, self.map, self.model, self.packed = checkpoint, key_map, model, packed.weights
        self.shapes = saved_tensors(model)
        self._finite: set[tuple[str, int | None]] = set()  # what was read before, and is not looked at again

    def _read(self, source: Source, expert: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """Read one source, unpacked, or one expert of it; into `buffer` where it is not packed.

        Raises UserError for other dtypes, and naming the tensor that holds NaN or infinity.
        """
        value = self._unpacked(source, expert, buffer)
        if (source.key, expert) not in self._finite:
            self._check_finite(source.key, value)
            self._finite.add((source.key, expert))
        return value

    def _check_finite(self, key: str, value: Tensor) -> None:
        """Raise UserError where what was read of a tensor is not finite."""
        info = self.checkpoint.tensors.get(key)  # packed weights have tensors of other names
        where = f"checkpoint {self.checkpoint.folder}" if info is None else f"checkpoint file {info.file}"
        refuse_not_finite(value, f"{where}: tensor {key!r}", "download it again, or mend what wrote the checkpoint")

    def _unpacked(self, source: Source, expert: int | None, buffer: Tensor | None) -> Tensor:
        span = (0, None) if expert is None else (expert, expert + 1)
        packed = self.packed.get(source.key)
        if packed is not None:
            raw = packed.read(self.checkpoint, *span)
            return raw if expert is None else raw[0]
        raw = self.checkpoint.read(source.key, *span, buffer=buffer)
        if not raw.is_floating_point() or raw.dtype.itemsize == 1:
            info = self.checkpoint[source.key]
            raise UserError(
                f"checkpoint file {info.file}: tensor {source.key!r} has dtype {str(raw.dtype).removeprefix('torch.')}, "
                "which is not a weight that can be read as it is"
            )
        return raw if expert is None else raw[0]

    def source_bytes(self, source: Source, expert: bool = False) -> int:
        """Return the stored bytes of one source, or of one expert's share of it."""
        one_of_stack = expert and source.expert is None
        if source.key in self.packed:
            return self.packed[source.key].nbytes(self.checkpoint, one_of_stack)
        info = self.checkpoint[source.key]
        return info.row_bytes if one_of_stack else info.nbytes

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
            return self._read(sources[0])
        by_part = [
            torch.stack(
                [self._read(s) for s in sorted((s for s in sources if s.part == p), key=lambda s: s.expert or 0)]
            )
            for p in range(sources[0].parts)
        ]
        return by_part[0] if len(by_part) == 1 else torch.cat(by_part, 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a plain parameter, such as an embedding table."""
        source = self.map.sources[name][0]
        if name in self.map.converters:
            return self.parameter(name)[start:stop]
        if source.key in self.packed:
            value = self.packed[source.key].read(self.checkpoint, start, stop)
        else:
            value = self.checkpoint.read(source.key, start, stop)
        self._check_finite(source.key, value)
        return value

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
        both = self._matrix(sources[0], expert, layout.transposed != self._stored_transposed(name, sources[0]), buffer)
        if layout.interleaved:
            return both[0::2], both[1::2]
        return both.chunk(2)  # type: ignore[return-value]

    def _stored_transposed(self, name: str, source: Source) -> bool:
        """Return whether experts are stored with their two axes the other way round than the model keeps them."""
        if name not in self.map.converters:
            return False
        packed = self.packed.get(source.key)
        stored = self.checkpoint[source.key].shape if packed is None else packed.shape(self.checkpoint)
        return len(stored) == 3 and tuple(stored) != tuple(self.shapes[name].shape)

    def down(self, name: str, expert: int, layout: Layout, buffer: Tensor | None = None) -> Tensor:
        """Read down [H, F] of one expert."""
        source = self.expert_sources(name, expert)[0]
        return self._matrix(source, expert, layout.transposed != self._stored_transposed(name, source), buffer)

    def _matrix(self, source: Source, expert: int, transposed: bool, buffer: Tensor | None) -> Tensor:
        """Read one expert's matrix in plain orientation [out, in]."""
        value = self._read(source, None if source.expert is not None else expert, buffer)
        return value.mT if transposed else value

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
