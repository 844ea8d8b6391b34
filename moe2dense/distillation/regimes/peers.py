"""Regimes with a second model: a peer that learns too (DML), or an average of the student's own weights.

The targets of a step are a mixture: regime.share of the peer's distribution, the rest the given teacher's.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.config.schedules import scheduled
from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.regimes.checks import brings_targets
from moe2dense.distillation.regimes.peer_trainer import PeerTrainer
from moe2dense.distillation.step import StepPlan
from moe2dense.distillation.targets.memory import ResidentTargets
from moe2dense.distillation.targets.mixture import MixedTargets
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.errors import UserError
from moe2dense.modeling.kinds import BuiltStudent, language_model
from moe2dense.teacher.kinds import AnyTeacher


class PeerRegime(Regime, ABC):
    """Targets that are partly a second model's, the peer's. Subclasses say which model that is."""

    def __init__(self, options: RegimeConfig):
        self.options = options
        self.brings_targets = brings_targets(self.name, options)
        self.steps = 1
        self._batches: Batches | None = None

    @classmethod
    def create(
        cls, options: RegimeConfig, teacher: AnyTeacher | None, peer: BuiltStudent | PreTrainedModel | None
    ) -> Regime:
        """Make the regime for one run."""
        return cls(options)

    def settings(self) -> dict[str, Any]:
        """Return the regime's options."""
        return asdict(self.options)

    def begin(self, run: RunView) -> None:
        """Note the run."""
        self.steps, self.run = run.steps, run

    @abstractmethod
    def peer_targets(self) -> Targets:
        """Return the peer's answers on the training text."""

    def batches_for(self, step: int, batches: Batches, plan: StepPlan) -> tuple[Batches, StepPlan]:
        """Return the fixed text with mixed targets."""
        if self._batches is None:
            self._batches = replace(batches)
        self._batches.targets = self.mixed(step, batches, self.peer_targets())
        return self._batches, plan

    def mixed(self, step: int, batches: Batches, peer: Targets) -> Targets:
        """Return the teacher's targets with regime.share of `peer`.

        Raises UserError where a share is left for a teacher that is not there.
        """
        share = scheduled(self.options.share, step, self.steps)
        if batches.targets is None:
            if share < 1:
                raise UserError(f"regime.share is {share:g}, and the rest is the teacher's: give a teacher, or share 1")
            return peer
        return MixedTargets([(1 - share, batches.targets), (share, peer)])


class Ema(PeerRegime):
    """The peer is the average of the student's weights over its steps (mean teacher, 1703.01780)."""

    name = "ema"

    def begin(self, run: RunView) -> None:
        """Start the average at the student's weights."""
        super().begin(run)
        model = copy.deepcopy(run.model).requires_grad_(False).to(run.accelerator.device)
        averages = dict(model.named_parameters())
        self.pairs = {n: (averages[n], p) for n, p in run.model.named_parameters() if p.requires_grad}
        self.targets = ResidentTargets(model, run.batches.blocks)

    def peer_targets(self) -> Targets:
        """Return the averaged model's answers."""
        return self.targets

    @torch.no_grad()
    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Move the average towards the student."""
        for average, weight in self.pairs.values():
            average.lerp_(weight.detach(), 1 - self.options.decay)
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights."""
        return {n: average.cpu() for n, (average, _) in self.pairs.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back the averaged weights."""
        for name, (average, _) in self.pairs.items():
            average.copy_(state[name])


class TrainedPeerRegime(PeerRegime):
    """The peer is another model, which trains too."""

    def __init__(self, peer: PreTrainedModel, options: RegimeConfig):
        super().__init__(options)
        self.peer_model = peer

    def begin(self, run: RunView) -> None:
        """Give the peer an optimiser and targets of its own."""
        super().begin(run)
        self.peer_trainer = PeerTrainer(self.peer_model, run, self.options.peer_lr)
        self.targets = ResidentTargets(self.peer_model, run.batches.blocks)
        self._peer_batches: Batches | None = None

    def peer_targets(self) -> Targets:
        """Return the peer's present answers."""
        return self.targets

    def peer_batches(self, batches: Batches) -> Batches:
        """Return what the peer learns from: the same text, without targets."""
        if self._peer_batches is None:
            self._peer_batches = replace(batches, targets=None)
        return self._peer_batches

    def state(self) -> dict[str, Tensor]:
        """Return the peer's weights and optimiser state."""
        return self.peer_trainer.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back the peer's weights and optimiser state."""
        self.peer_trainer.load_state(state)


class Mutual(TrainedPeerRegime):
    """Deep mutual learning (1706.00384): two students, each learns from the other's present predictions, in turn."""

    name = "mutual"

    @classmethod
    def create(
        cls, options: RegimeConfig, teacher: AnyTeacher | None, peer: BuiltStudent | PreTrainedModel | None
    ) -> Regime:
        """Make the regime for one run. Raises UserError without a second student."""
        if peer is None:
            raise UserError("the mutual regime needs a second student (peer)")
        return cls(language_model(peer), options)

    def begin(self, run: RunView) -> None:
        """Make the student a teacher of the peer."""
        super().begin(run)
        self.student_targets = ResidentTargets(run.model, run.batches.blocks)

    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Let the peer make the same step, with the student in the peer's place."""
        peer_batches = self.peer_batches(batches)
        peer_batches.targets = self.mixed(step, self.run.batches, self.student_targets)
        return {"peer_loss": self.peer_trainer.step(peer_batches, plan)["loss"]}
