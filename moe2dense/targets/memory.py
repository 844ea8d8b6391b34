"""Targets kept in memory: the teacher's final hidden states, computed in one pass, or a resident teacher asked anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe2dense.data import Blocks
from moe2dense.errors import UserError
from moe2dense.losses.head import model_head
from moe2dense.losses.rows import HiddenRows, TeacherRows
from moe2dense.losses.student import final_hidden
from moe2dense.metrics import model_inputs

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
    """hidden [N, S, H], the teacher's final normed hidden states, and head, which turns them into logits."""

    hidden: Tensor
    head: Any

    def __len__(self) -> int:
        return len(self.hidden)

    def batch(self, indices: Sequence[int]) -> HiddenRows:
        return HiddenRows(self.hidden[list(indices)].flatten(0, 1), self.head)


@dataclass
class ResidentTargets:
    """A transformers model that answers batch by batch while the student trains: no storage, one more forward pass."""

    model: Any
    blocks: Blocks

    def __post_init__(self) -> None:
        self.head = model_head(self.model)

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> HiddenRows:
        device = self.head.weight.device
        training = self.model.training
        self.model.eval()
        hidden = final_hidden(self.model, model_inputs(self.blocks[list(indices)], device))
        self.model.train(training)
        return HiddenRows(hidden.flatten(0, 1), self.head)


@torch.no_grad()
def hidden_targets(
    teacher: Any, blocks: Blocks, dtype: torch.dtype | None = None, batch: int = 8, progress: Progress | None = None
) -> HiddenTargets:
    """The teacher's final hidden states on all blocks, in memory: one streamed pass of a Teacher.

    teacher: a Teacher, or a resident transformers model, which is run `batch` blocks at a time. dtype: of what is kept,
    by default the teacher's compute dtype (float32 on a CPU).
    """
    if hasattr(teacher, "run"):
        out = teacher.run(blocks.input_ids, blocks.attention_mask, blocks.document_ids, logits=False)
        hidden = out.hidden_states
        return HiddenTargets(hidden if dtype is None else hidden.to(dtype), teacher.head)
    resident = ResidentTargets(teacher, blocks)
    parts = []
    for start in range(0, len(blocks), batch):
        rows = range(start, min(start + batch, len(blocks)))
        part = resident.batch(rows).hidden.cpu()
        parts.append(part.to(dtype or part.dtype).view(len(rows), -1, part.shape[-1]))
        if progress:
            progress("targets", rows.stop, len(blocks))
    return HiddenTargets(torch.cat(parts), resident.head)


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
