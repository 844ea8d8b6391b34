"""Multi-view self-distillation: the student learns the mean prediction of several noisy views of the same text.

A view drops elements of the embeddings, each its own. As consistency training with dropout (R-Drop, 2106.14448; temporal
ensembling, 1610.02242), with the mean of the views in the target's place. What is dropped is a function of seed, step, view
and block alone, so neither the number of processes nor a resumption changes it.
"""

from typing import Any

import torch
from torch import Tensor

from moe2dense.common.seeds import uniforms
from moe2dense.config.schema import RegimeConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import RunView
from moe2dense.distillation.regimes.peers import Peer
from moe2dense.distillation.step import Plan
from moe2dense.distillation.targets.mixture import MixedRows
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.forward import final_hidden, model_inputs
from moe2dense.modeling.head import model_head

# N blocks, S block length, H hidden
_BLOCKS = 2**32  # more than there are


class MultiView(Peer):
    """The peer is the student itself, seen through `regime.views` masks; its own pass has one more."""

    name = "multiview"

    def __init__(self, options: RegimeConfig):
        super().__init__(options)
        self.mask: Tensor | None = None

    def begin(self, run: RunView) -> None:
        super().begin(run)
        self.model, self.blocks, self.seed, self.step = run.model, run.batches.blocks, run.seed, 0
        self.head = model_head(self.model)
        embedding = self.model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(self._drop)
        self.width = int(self.head.weight.shape[1])

    def __len__(self) -> int:
        return len(self.blocks)

    def peer(self) -> Any:
        return self

    def batches_for(self, step: int, batches: Batches, plan: Plan) -> tuple[Batches, Plan]:
        self.step = step
        if self._batches is None:
            self._batches = _Viewed(batches.blocks, None, batches.watch, batches.weights)
            self._batches.regime = self
        return super().batches_for(step, batches, plan)

    @torch.no_grad()
    def batch(self, indices: Any) -> MixedRows:
        """The mean of the views of some blocks."""
        rows, views = list(indices), self.options.views
        inputs = model_inputs(self.blocks[rows], self.head.weight.device)
        training, parts = self.model.training, []
        self.model.eval()
        for view in range(1, views + 1):
            self.mask = self.kept(rows, view)
            parts.append((1 / views, HiddenRows(final_hidden(self.model, inputs).flatten(0, 1), self.head)))
        self.mask = None
        self.model.train(training)
        return MixedRows(parts)

    def kept(self, rows: list[int], view: int) -> Tensor:
        """[N, S, H]: 0 where a view drops an element, else 1 / (1 - dropout)."""
        length, rate = self.blocks.input_ids.shape[1], self.options.dropout
        first = (self.step * (self.options.views + 1) + view) * _BLOCKS
        drawn = [uniforms(self.seed, first + i, length * self.width) for i in rows]
        keep = torch.stack([torch.from_numpy(u) for u in drawn]).view(len(rows), length, self.width) >= rate
        return keep.to(self.head.weight.device) / (1 - rate)

    def _drop(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output if self.mask is None else output * self.mask.to(output.dtype)

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        self.mask = None
        return {}

    def finish(self, out: Any) -> None:
        self.handle.remove()


class _Viewed(Batches):
    """A batches that sets the mask of the student's own pass, which follows at once."""

    regime: MultiView

    def part(self, indices: list[int], device: torch.device, labels: bool, spare: int = 0) -> tuple[Any, Any, dict]:
        self.regime.mask = None
        found = super().part(indices, device, labels, spare)
        self.regime.mask = self.regime.kept(indices or [spare], 0)
        return found
