"""Online distillation: the teacher, whole in memory, learns the text while the student follows it.

Joint training of a large and a small network (rocket launching, 1708.04106), without sharing of layers. The router's
load-balancing loss is not part of it.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import Regime
from moe2dense.distillation.regimes.peers import TrainedPeerRegime
from moe2dense.distillation.step import StepPlan
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.errors import UserError
from moe2dense.modeling.kinds import BuiltStudent
from moe2dense.modeling.load import load_model
from moe2dense.teacher.kinds import AnyTeacher
from moe2dense.teacher.model import Teacher


class Online(TrainedPeerRegime):
    """The peer is the teacher itself; all of the target is its present answer."""

    name = "online"

    @classmethod
    def create(
        cls, options: RegimeConfig, teacher: AnyTeacher | None, peer: BuiltStudent | PreTrainedModel | None
    ) -> Regime:
        """Make the regime for one run. Raises UserError for a teacher that cannot be had in memory."""
        return cls(trainable(teacher), options)

    def mixed(self, step: int, batches: Batches, peer: Targets) -> Targets:
        """Return the peer's targets."""
        return peer

    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Let the teacher learn the next tokens of the same text."""
        record = self.peer_trainer.step(self.peer_batches(batches), replace(plan, alpha=1.0))
        return {"teacher_ce": record["loss"]}


def trainable(teacher: AnyTeacher | None) -> PreTrainedModel:
    """Return the teacher as a transformers model in memory, which can learn. Raises UserError without one."""
    if teacher is None:
        raise UserError("the online regime trains the teacher too and needs it in memory: pass teacher=")
    if not isinstance(teacher, Teacher):
        return teacher
    return load_model(
        teacher.path, "the online regime's teacher", experts_implementation="eager" if teacher.card else None
    )
