"""The optimisers of training: AdamW, or Muon on the matrices inside the layers and AdamW on the rest.

Muon (https://kellerjordan.github.io/posts/muon/) makes each matrix's step orthogonal. Its steps have the size that AdamW's have
(Moonlight, arXiv 2502.16982).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe2dense.config.training import TrainConfig
from moe2dense.distillation.cost import uses_muon
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.optimizers.muon import Muon
from moe2dense.optimizers.tensorwise import holds_less, tensorwise_optimizer

BETAS = (0.9, 0.95)
RATE = "rate"  # of a group of parameters: what the run's learning rate is multiplied with
MUON_RATE = 4.0  # 2 and 10 times AdamW's rate are worse on the example (docs/students.md)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on some matrices and AdamW on other parameters, as one optimiser: their groups and their state are its own."""

    def __init__(self, matrices: Sequence[nn.Parameter], groups: Sequence[dict[str, Any]], lr: float):
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=lr * MUON_RATE),
            torch.optim.AdamW(list(groups), lr=lr, betas=BETAS, fused=True),
        ]
        self.parts[0].param_groups[0][RATE] = MUON_RATE
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Give both parts the groups and the state of the whole, which loading replaces."""
        for part, groups in zip(self.parts, (self.param_groups[:1], self.param_groups[1:]), strict=True):
            part.param_groups, part.state = groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        for part in self.parts:
            part.step()
        return loss


def layer_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the matrices of a model's decoder layers that train."""
    return [p for layer in decoder_layers(model) for p in layer.parameters() if p.dim() == 2 and p.requires_grad]


def muon_matrices(model: PreTrainedModel, config: TrainConfig) -> list[nn.Parameter]:
    """Return the matrices that Muon trains by the settings; none where AdamW trains all."""
    hidden_size = model.config.get_text_config().hidden_size
    return layer_matrices(model) if uses_muon(config, hidden_size) else []


def make_optimizer(
    model: nn.Module, config: TrainConfig, matrices: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Make the optimiser over the parameters that train; norms and biases are not decayed.

    matrices: those that Muon takes, where the settings have it; the others, or all, are AdamW's.
    """
    chosen = {id(p) for p in matrices}
    by_decay: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in chosen:
            by_decay.setdefault(config.weight_decay if parameter.dim() > 1 else 0.0, []).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]
    if holds_less(config):
        return tensorwise_optimizer(groups, config)
    if chosen:
        return MuonAdamW(matrices, groups, config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)
