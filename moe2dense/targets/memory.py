"""Targets kept in memory: the teacher's final hidden states, computed in one pass, or a resident teacher asked anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moe2dense.data import Blocks
from moe2dense.errors import UserError
from moe2dense.losses.head import model_head
from moe2dense.losses.rows import HiddenRows, TeacherRows
from moe2dense.losses.student import captured_layers, decoder_layers, final_hidden
from moe2dense.metrics import model_inputs
from moe2dense.teacher.capture import Observer

# N blocks, S block length, H teacher hidden, V vocabulary

Progress = Callable[..., None]


class Targets(Protocol):
    """What the loss needs of the teacher, for N blocks."""

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """The teacher at every position of some blocks, in their order."""
        ...


@dataclass
class HiddenTargets:
    """hidden [N, S, H], the teacher's final normed hidden states, and head, which turns them into logits.

    features: the residual stream [N, S, H] after some of the teacher's layers; layers: how many it has.
    """

    hidden: Tensor
    head: Any
    features: dict[int, Tensor] = field(default_factory=dict)
    layers: int = 0

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice) -> "HiddenTargets":
        return HiddenTargets(self.hidden[rows], self.head, {k: v[rows] for k, v in self.features.items()}, self.layers)

    def batch(self, indices: Sequence[int]) -> HiddenRows:
        rows = list(indices)
        features = {k: v[rows].flatten(0, 1) for k, v in self.features.items()}
        return HiddenRows(self.hidden[rows].flatten(0, 1), self.head, features or None)


@dataclass
class ResidentTargets:
    """A transformers model that answers batch by batch while the student trains: no storage, one more forward pass."""

    model: Any
    blocks: Blocks
    features: Sequence[int] = ()  # layers whose residual stream is wanted too

    def __post_init__(self) -> None:
        self.head = model_head(self.model)
        self.layers = len(decoder_layers(self.model))

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> HiddenRows:
        device = self.head.weight.device
        training = self.model.training
        self.model.eval()
        with captured_layers(self.model, self.features) as found:
            hidden = final_hidden(self.model, model_inputs(self.blocks[list(indices)], device))
        self.model.train(training)
        return HiddenRows(hidden.flatten(0, 1), self.head, found or None)


class _Recorder(Observer):
    """Keeps the residual stream after some layers of a streamed teacher, over all its passes."""

    def __init__(self, layers: Sequence[int], dtype: torch.dtype):
        self.dtype, self.parts = dtype, {i: [] for i in layers}

    def layer(self, layer: Any) -> None:
        if layer.index in self.parts:
            self.parts[layer.index].append(layer.hidden_out.detach().to("cpu", self.dtype, copy=True))


@torch.no_grad()
def hidden_targets(
    teacher: Any,
    blocks: Blocks,
    dtype: torch.dtype | None = None,
    batch: int = 8,
    features: Sequence[int] = (),
    progress: Progress | None = None,
) -> HiddenTargets:
    """The teacher's final hidden states on all blocks, in memory: one streamed pass of a Teacher.

    teacher: a Teacher, or a resident transformers model, which is run `batch` blocks at a time. dtype: of what is kept,
    by default the teacher's compute dtype (float32 on a CPU). features: layers whose residual stream is kept too.
    """
    if hasattr(teacher, "run"):
        recorder = _Recorder(features, dtype or teacher.dtype)
        masks = (blocks.attention_mask, blocks.document_ids)
        out = teacher.run(blocks.input_ids, *masks, observers=[recorder] if features else [], logits=False)
        hidden = out.hidden_states if dtype is None else out.hidden_states.to(dtype)
        kept = {k: torch.cat(v) for k, v in recorder.parts.items()}
        return HiddenTargets(hidden, teacher.head, kept, teacher.config.get_text_config().num_hidden_layers)
    resident = ResidentTargets(teacher, blocks, features)
    parts, states = [], {i: [] for i in features}
    for start in range(0, len(blocks), batch):
        rows = range(start, min(start + batch, len(blocks)))
        answer = resident.batch(rows)
        for found, kept in ((answer.hidden, parts), *((v, states[k]) for k, v in (answer.features or {}).items())):
            kept.append(found.to("cpu", dtype or found.dtype).view(len(rows), -1, found.shape[-1]))
        if progress:
            progress("targets", rows.stop, len(blocks))
    return HiddenTargets(torch.cat(parts), resident.head, {k: torch.cat(v) for k, v in states.items()}, resident.layers)


def as_targets(source: Any, blocks: Blocks, what: str = "targets") -> Targets:
    """Targets from whatever holds them: targets, or anything with hidden [N, S, H] and a head.

    Raises UserError when there are not as many as blocks.
    """
    found = source
    if not hasattr(source, "batch"):
        if getattr(source, "hidden", None) is None or getattr(source, "head", None) is None:
            raise UserError(
                f"{what} must be stored targets or hidden states with a head; found {type(source).__name__}"
            )
        found = HiddenTargets(source.hidden, source.head)
    if len(found) != len(blocks):
        raise UserError(f"{what} cover {len(found)} blocks but the data has {len(blocks)}; they must be the same text")
    return found
