"""Which of a run's students is exported: of the last step, of the checkpoint that was best on held-out text, or as it was built."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe2dense.config.training import TrainConfig
from moe2dense.distillation.adapters import add_adapters, merge_adapters
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.student.open import open_student
from moe2dense.student.types import Student

BUILT, BEST, LAST = "built", "best", "last"


@dataclass(frozen=True)
class Choice:
    """The exported student and why it is that one, by KL to the teacher on the held-out text.

    exported: "built", "best" (a checkpoint before the last step) or "last". step: after how many steps its weights were, 0 for the
    built one. kl: of each candidate.
    """

    exported: str
    step: int
    steps: int
    kl: dict[str, float]

    @property
    def gained(self) -> bool:
        """Whether training brought the student closer to its teacher."""
        return self.exported != BUILT

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the report has them."""
        return {"exported": self.exported, "step": self.step, "steps": self.steps, "kl": self.kl, "gained": self.gained}


def choose(built_kl: float, trained: Mapping[str, Any]) -> Choice:
    """Return what is exported, given the built student's KL and the record that training left in the run.

    A trained student is exported only where it is closer to the teacher than the built one.
    """
    kl = {BUILT: built_kl, **trained["kl"]}
    exported = trained["exported"] if kl[trained["exported"]] < built_kl else BUILT
    step = {BUILT: 0, BEST: trained["best_step"], LAST: trained["steps"]}[exported]
    return Choice(exported, step, trained["steps"], kl)


def load_checkpoint(student: Student, folder: Path, step: int, built: Path, config: TrainConfig) -> Student:
    """Return the trained student with the weights of an earlier checkpoint.

    folder: of the checkpoints. built: the student before training, which adapters of that checkpoint belong to; without adapters
    the weights are put into `student` itself.
    """
    weights, _, _ = Checkpoints(folder).load(step)
    model = student.model
    if config.lora:
        student = open_student(str(built))
        model = add_adapters(student.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    if config.lora:
        merge_adapters(model)
    return student
