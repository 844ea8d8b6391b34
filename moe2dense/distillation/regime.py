"""What a training regime may change of a run of `distill`: the text and targets of a step, what happens after it, and its state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.config.schema import TrainConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.step import Plan


@dataclass(frozen=True)
class RunView:
    """What a regime may know of the training run it changes."""

    model: PreTrainedModel  # the student, adapters included
    batches: Batches  # of the fixed text
    steps: int  # optimiser steps of the whole run
    per_step: int  # blocks per step
    seed: int
    accelerator: Accelerator
    config: TrainConfig
    folder: Path | None  # of the training run; None = nothing is written


class Regime:
    """Plain distillation on fixed text. A regime overrides what it changes; the loop, its checkpoints and its log stay the trainer's.

    Every process holds its own and calls the same methods in the same order. All that a regime does must be a function of
    the step, the seed, the weights and its own `state`, so that a run can stop anywhere and go on bit by bit.
    """

    name = ""
    brings_targets = False  # the regime's own batches have targets: `distill` computes none for the fixed text
    always_new = False  # every step asks the teacher anew, also of text that was seen before

    def about(self) -> dict[str, Any]:
        """The settings that must not change between a run and its continuation, as plain values."""
        return {}

    def extra(self, model: Any) -> nn.Module | None:
        """A module that trains beside the student, see `Objective`. Called before the optimiser is made."""
        return None

    def begin(self, run: RunView) -> None:
        """The run is ready: its objective, optimiser and folder exist, no step was made and no checkpoint read."""

    def batches_for(self, step: int, batches: Batches, plan: Plan) -> tuple[Batches, Plan]:
        """Text and targets of step `step` (from 0), given those of fixed text; plan.indices count in the batches that is returned."""
        return batches, plan

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        """The student has made step `step` on what `batches` returned. Returns numbers for the log."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, on the CPU."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""

    def saved(self, step: int) -> None:
        """A checkpoint after `step` steps is whole: what only earlier steps need may go."""

    def finish(self, out: Path | None) -> None:
        """The last step is made; out is the folder of the training run."""
