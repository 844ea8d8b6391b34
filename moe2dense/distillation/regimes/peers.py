"""Regimes with a second model in memory: a teacher that learns too, a peer (DML), or an average of the student's own weights.

The targets of a step are a mixture: regime.share of the peer's distribution, the rest the given teacher's.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from moe2dense.config.schedules import scheduled
from moe2dense.config.schema import RegimeConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.checkpoints import optimizer_tensors, restore_optimizer
from moe2dense.distillation.objective import Objective
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.setup import make_optimizer
from moe2dense.distillation.step import Plan, train_step
from moe2dense.distillation.targets.memory import ResidentTargets, Targets
from moe2dense.distillation.targets.mixture import MixedTargets
from moe2dense.errors import UserError


def always(share: str) -> float | None:
    """The value of a schedule that never changes, else None."""
    first, last = (scheduled(share, s, 2) for s in (0, 1))
    return first if first == last and not share.startswith("step") else None


class Trained:
    """A second model that trains along, with an optimiser of its own, by the same steps as the student."""

    def __init__(self, model: Any, run: RunView, lr: float):
        self.accelerator, self.config = run.accelerator, run.config
        self.rate = lr / run.config.lr if lr > 0 else 1.0
        if next(model.parameters()).dtype != torch.float64:
            model.float()
        model.requires_grad_(True)
        objective: Any = Objective(model)
        self.model = model
        self.objective, self.optimizer = self.accelerator.prepare(objective, make_optimizer(objective, run.config))
        self.names = {p: n.removeprefix("model.") for n, p in objective.named_parameters()}

    def step(self, batches: Batches, plan: Plan) -> dict[str, Any]:
        """One step on `batches`, at the student's rate times a constant; features stay the student's."""
        plan = replace(plan, lr=plan.lr * self.rate, feature_weights=())
        return train_step(self.accelerator, self.objective, self.optimizer, batches, plan, self.config)

    def state(self) -> dict[str, Tensor]:
        weights = {f"weights/{n}": p.detach().cpu() for p, n in self.names.items()}
        return weights | {
            f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer.optimizer, self.names).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(state[f"weights/{name}"])
        own = {k.removeprefix("optimizer/"): v for k, v in state.items() if k.startswith("optimizer/")}
        restore_optimizer(self.optimizer.optimizer, self.names, own)


class Peer(Regime, ABC):
    """Targets that are partly a second model's. Subclasses say which."""

    def __init__(self, options: RegimeConfig):
        self.options = options
        self.brings_targets = always(options.share) == 1.0
        self._batches: Batches | None = None
        self.steps = 1

    def about(self) -> dict[str, Any]:
        return asdict(self.options)

    def begin(self, run: RunView) -> None:
        self.steps, self.run = run.steps, run

    @abstractmethod
    def peer(self) -> Targets:
        """The second model's answers on the training text."""

    def batches_for(self, step: int, batches: Batches, plan: Plan) -> tuple[Batches, Plan]:
        if self._batches is None:
            self._batches = replace(batches)
        self._batches.targets = self.mixed(step, batches, self.peer())
        return self._batches, plan

    def mixed(self, step: int, batches: Batches, own: Targets) -> Targets:
        """The teacher's targets with regime.share of `own`."""
        share = scheduled(self.options.share, step, self.steps)
        if batches.targets is None:
            if share < 1:
                raise UserError(f"regime.share is {share:g}, and the rest is the teacher's: give a teacher, or share 1")
            return own
        return MixedTargets([(1 - share, batches.targets), (share, own)])


class Ema(Peer):
    """The peer is the average of the student's weights over its steps (mean teacher, 1703.01780)."""

    name = "ema"

    def begin(self, run: RunView) -> None:
        super().begin(run)
        self.model = copy.deepcopy(run.model).requires_grad_(False).to(run.accelerator.device)
        mine = dict(self.model.named_parameters())
        self.pairs = {n: (mine[n], p) for n, p in run.model.named_parameters() if p.requires_grad}
        self.targets = ResidentTargets(self.model, run.batches.blocks)

    def peer(self) -> Targets:
        return self.targets

    @torch.no_grad()
    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        for average, now in self.pairs.values():
            average.lerp_(now.detach(), 1 - self.options.decay)
        return {}

    def state(self) -> dict[str, Tensor]:
        return {n: average.cpu() for n, (average, _) in self.pairs.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, (average, _) in self.pairs.items():
            average.copy_(state[name])


class _Beside(Peer):
    """The peer trains too."""

    def __init__(self, model: Any, options: RegimeConfig):
        super().__init__(options)
        self.second = model

    def begin(self, run: RunView) -> None:
        super().begin(run)
        self.along = Trained(self.second, run, self.options.peer_lr)
        self.targets = ResidentTargets(self.second, run.batches.blocks)
        self._own: Batches | None = None

    def peer(self) -> Targets:
        return self.targets

    def own_batches(self, batches: Batches) -> Batches:
        """What the peer learns from: the same text."""
        if self._own is None:
            self._own = replace(batches, targets=None)
        return self._own

    def state(self) -> dict[str, Tensor]:
        return self.along.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.along.load_state(state)


class Online(_Beside):
    """The peer is the teacher itself, which learns the text's next tokens while the student follows it.

    Joint training of a large and a small network (rocket launching, 1708.04106), without sharing of layers. The router's
    load-balancing loss is not part of it.
    """

    name = "online"

    def __init__(self, teacher: Any, options: RegimeConfig):
        super().__init__(teacher, options)
        self.brings_targets = True

    def mixed(self, step: int, batches: Batches, own: Targets) -> Targets:
        return own

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        record = self.along.step(self.own_batches(batches), replace(plan, alpha=1.0))
        return {"teacher_ce": record["loss"]}


class Mutual(_Beside):
    """Deep mutual learning (1706.00384): two students, each learns from the other's present predictions, in turn."""

    name = "mutual"

    def batches_for(self, step: int, batches: Batches, plan: Plan) -> tuple[Batches, Plan]:
        self.given = batches
        return super().batches_for(step, batches, plan)

    def begin(self, run: RunView) -> None:
        super().begin(run)
        self.student = ResidentTargets(run.model, run.batches.blocks)

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        own = self.own_batches(batches)
        own.targets = self.mixed(step, self.given, self.student)
        return {"peer_loss": self.along.step(own, plan)["loss"]}
