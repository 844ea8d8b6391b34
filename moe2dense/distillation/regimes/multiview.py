"""Multi-view self-distillation: the student learns the mean prediction of several noisy views of the same text.

A view drops elements of the embeddings, each its own. As consistency training with dropout (R-Drop, 2106.14448; temporal
ensembling, 1610.02242), with the mean of the views in the target's place. What is dropped is a function of seed, step, view
and block alone, so neither the number of processes nor a resumption changes it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.common.seeds import uniforms
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import RunView
from moe2dense.distillation.regimes.peers import PeerRegime
from moe2dense.distillation.step import StepPlan
from moe2dense.distillation.targets.mixture import MixedRows
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.forward import evaluation_mode, final_hidden, model_inputs
from moe2dense.modeling.head import model_head

# N blocks, S block length, H hidden
_MAX_BLOCKS = 2**32  # more than any text has: every view of every block draws from numbers of its own


@contextlib.contextmanager
def scaled_embeddings(model: PreTrainedModel, scale: Tensor) -> Iterator[None]:
    """Multiply the embeddings [N, S, H] of the model's input by `scale` within the context."""

    def multiply(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * scale.to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


class MultiView(PeerRegime):
    """The peer is the student itself, seen through `regime.views` masks; it learns through one more."""

    name = "multiview"

    def begin(self, run: RunView) -> None:
        """Note the student and the text."""
        super().begin(run)
        self.model, self.blocks, self.seed, self.step = run.model, run.batches.blocks, run.seed, 0
        self.head = model_head(self.model)
        self.width = int(self.head.weight.shape[1])

    def __len__(self) -> int:
        return len(self.blocks)

    def peer_targets(self) -> Targets:
        """Return the regime itself, which answers with the mean of the views."""
        return self

    def batches_for(self, step: int, batches: Batches, plan: StepPlan) -> tuple[Batches, StepPlan]:
        """Return the fixed text with mixed targets."""
        self.step = step
        return super().batches_for(step, batches, plan)

    def pass_context(self, rows: list[int]) -> AbstractContextManager[None]:
        """Drop elements of the embeddings of the student's own pass."""
        return scaled_embeddings(self.model, self.mask(rows, 0))

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> MixedRows:
        """Return the mean of the views of some blocks."""
        rows, views = list(indices), self.options.views
        inputs, parts = model_inputs(self.blocks[rows], self.head.weight.device), []
        for view in range(1, views + 1):
            with evaluation_mode(self.model), scaled_embeddings(self.model, self.mask(rows, view)):
                hidden = final_hidden(self.model, inputs).flatten(0, 1)
            parts.append((1 / views, HiddenRows(hidden, self.head)))
        return MixedRows(parts)

    def mask(self, rows: list[int], view: int) -> Tensor:
        """Return [N, S, H]: 0 where a view drops an element, else 1 / (1 - dropout)."""
        length, rate = self.blocks.input_ids.shape[1], self.options.dropout
        first = (self.step * (self.options.views + 1) + view) * _MAX_BLOCKS
        drawn = [uniforms(self.seed, first + i, length * self.width) for i in rows]
        keep = torch.stack([torch.from_numpy(u) for u in drawn]).view(len(rows), length, self.width) >= rate
        return keep.to(self.head.weight.device) / (1 - rate)
