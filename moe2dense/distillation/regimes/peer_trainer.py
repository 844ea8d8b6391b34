"""A second model that trains with the student, by the same steps and an optimiser of its own."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.distillation.batches import Batches
from moe2dense.distillation.checkpoints import optimizer_tensors, restore_optimizer
from moe2dense.distillation.objective import Objective
from moe2dense.distillation.optimizers import make_optimizer, muon_matrices
from moe2dense.distillation.regime import RunView
from moe2dense.distillation.step import StepPlan, train_step


class PeerTrainer:
    """Trains `model`; lr: its peak rate, 0 for the student's."""

    def __init__(self, model: PreTrainedModel, run: RunView, lr: float):
        self.accelerator, self.config = run.accelerator, run.config
        self.rate = lr / run.config.lr if lr > 0 else 1.0
        if next(model.parameters()).dtype != torch.float64:
            model.float()
        model.requires_grad_(True)
        objective = Objective(model)
        optimizer = make_optimizer(objective, run.config, muon_matrices(model, run.config))
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.names: dict[Tensor, str] = {p: n.removeprefix("model.") for n, p in objective.named_parameters()}

    def step(self, batches: Batches, plan: StepPlan) -> dict[str, Any]:
        """Make one step on `batches`, at the student's rate times a constant; features stay the student's."""
        plan = replace(plan, lr=plan.lr * self.rate, feature_weights=())
        return train_step(self.accelerator, self.objective, self.optimizer, batches, plan, self.config)

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimiser state, on the CPU."""
        weights = {f"weights/{n}": p.detach().cpu() for p, n in self.names.items()}
        optimizer = optimizer_tensors(self.optimizer.optimizer, self.names)
        return weights | {f"optimizer/{k}": v for k, v in optimizer.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(state[f"weights/{name}"])
        optimizer = {k.removeprefix("optimizer/"): v for k, v in state.items() if k.startswith("optimizer/")}
        restore_optimizer(self.optimizer.optimizer, self.names, optimizer)
