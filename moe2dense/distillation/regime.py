"""What a training regime may change of a run of `distill`: text and targets of a step, and what follows it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe2dense.config.training import RegimeConfig, TrainConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.step import StepPlan
from moe2dense.modeling.kinds import BuiltStudent
from moe2dense.teacher.kinds import AnyTeacher


@dataclass(frozen=True)
class RunView:
    """What a regime may know of the training run it changes.

    model: the student, adapters included; batches: of the fixed text; steps: of the whole run; per_step: blocks of a step;
    folder: of the training run, None where nothing is written.
    """

    model: PreTrainedModel
    batches: Batches
    steps: int
    per_step: int
    seed: int
    accelerator: Accelerator
    config: TrainConfig
    folder: Path | None


class Regime:
    """Plain distillation on fixed text; a regime overrides what it changes.

    The loop, its checkpoints and its log stay the trainer's. Every process holds its own and calls the same methods in the
    same order. All that a regime does must be a function of the step, the seed, the weights and its own `state`, so that a
    run can stop anywhere and go on bit by bit.
    """

    name = ""
    # the regime's own batches have targets: `distill` computes none for the fixed text
    brings_targets = False
    # every step asks the teacher anew, also about text that was seen before
    always_new = False

    @classmethod
    def create(
        cls, options: RegimeConfig, teacher: AnyTeacher | None, peer: BuiltStudent | PreTrainedModel | None
    ) -> "Regime":
        """Make the regime for one run of the models at hand. Raises UserError for a model that it needs and lacks."""
        return cls()

    def settings(self) -> dict[str, Any]:
        """Return the settings that must not change between a run and its continuation, as plain values."""
        return {}

    def extra_loss(self, model: PreTrainedModel) -> nn.Module | None:
        """Return a module that trains with the student, see `Objective`. Called before the optimiser is made."""
        return None

    def begin(self, run: RunView) -> None:
        """Prepare for the run: its objective, optimiser and folder exist, no step was made and no checkpoint read."""

    def batches_for(self, step: int, batches: Batches, plan: StepPlan) -> tuple[Batches, StepPlan]:
        """Return text and targets of step `step` (from 0), and a plan whose indices count in them.

        batches, plan: those of the fixed text.
        """
        return batches, plan

    def pass_context(self, rows: list[int]) -> AbstractContextManager[None]:
        """Return the context in which the student reads the blocks `rows` of the step that runs."""
        return nullcontext()

    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Act on a step that the student has made on what `batches_for` returned. Returns numbers for the log."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, on the CPU."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""

    def saved(self, step: int) -> None:
        """Drop what only steps before `step` need: a checkpoint after `step` steps is whole."""

    def finish(self, out: Path | None) -> None:
        """Act after the last step; out is the folder of the training run."""
