"""Multi-view self-distillation: the student learns the mean prediction of several noisy views of the same text.

A view drops elements of the embeddings, each its own. As consistency training with dropout (R-Drop, 2106.14448; temporal
ensembling, 1610.02242), with the mean of the views in the target's place. What is dropped is a function of seed, step, view
and block alone, so neither the number of processes nor a resumption changes it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe2dense.config import RegimeConfig
from moe2dense.generation.sampling import uniforms
from moe2dense.losses.head import model_head
from moe2dense.losses.rows import HiddenRows
from moe2dense.losses.student import final_hidden
from moe2dense.metrics import model_inputs
from moe2dense.regimes.companions import Companion
from moe2dense.regimes.mixture import MixedRows
from moe2dense.trainstep import Lesson, Plan

if TYPE_CHECKING:
    from moe2dense.trainer import Trainer

# N blocks, S block length, H hidden
_BLOCKS = 2**32  # more than there are


class MultiView(Companion):
    """The companion is the student itself, seen through `regime.views` masks; its own pass has one more."""

    name = "multiview"

    def __init__(self, options: RegimeConfig):
        super().__init__(options)
        self.mask: Tensor | None = None

    def begin(self, trainer: "Trainer") -> None:
        super().begin(trainer)
        self.model, self.blocks, self.seed, self.step = trainer.model, trainer.lesson.blocks, trainer.seed, 0
        self.head = model_head(self.model)
        embedding = self.model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(self._drop)
        self.width = embedding.weight.shape[1]

    def __len__(self) -> int:
        return len(self.blocks)

    def companion(self) -> Any:
        return self

    def lesson(self, step: int, lesson: Lesson, plan: Plan) -> tuple[Lesson, Plan]:
        self.step = step
        if self._lesson is None:
            self._lesson = _Viewed(lesson.blocks, None, lesson.watch, lesson.weights)
            self._lesson.regime = self
        return super().lesson(step, lesson, plan)

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

    def after_step(self, step: int, lesson: Lesson, plan: Plan) -> dict[str, float]:
        self.mask = None
        return {}

    def finish(self, out: Any) -> None:
        self.handle.remove()


class _Viewed(Lesson):
    """A lesson that sets the mask of the student's own pass, which follows at once."""

    regime: MultiView

    def part(self, indices: list[int], device: torch.device, labels: bool, spare: int = 0) -> tuple[Any, Any, dict]:
        self.regime.mask = None
        found = super().part(indices, device, labels, spare)
        self.regime.mask = self.regime.kept(indices or [spare], 0)
        return found
