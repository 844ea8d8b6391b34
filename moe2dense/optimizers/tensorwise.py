"""Step a model tensor by tensor with an optimiser of torch, so that training holds less.

`TensorwiseOptimizer` computes each step in float32 whatever precision weights rest in, holds gradients and float32 copies of one tensor at
a time, keeps moments in eight bits where asked to, and may keep everything but the weights in main memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe2dense.config.training import TrainConfig
from moe2dense.optimizers.packed_state import pack, unpack
from moe2dense.optimizers.rounding import round_at_random

BETAS = (0.9, 0.95)
MASTER = "master"  # the float32 copy of weights that are kept in main memory
NORM = "norm"  # of the whole gradient of the step before


def holds_less(config: TrainConfig) -> bool:
    """Return whether [train] asks for steps that are taken tensor by tensor."""
    if config.optimizer in ("adamw-8bit", "adafactor"):
        return True
    return config.weights != "float32" or config.offload or config.step_in_backward


def tensorwise_optimizer(groups: Sequence[dict[str, Any]], config: TrainConfig) -> "TensorwiseOptimizer":
    """Make the optimiser that `holds_less` over groups of parameters with their weight decay."""
    rule = "adafactor" if config.optimizer == "adafactor" else "adamw"
    groups = [group | {"rule": rule} for group in groups]
    return TensorwiseOptimizer(groups, config.lr, packed=config.optimizer == "adamw-8bit", offload=config.offload)


def _adamw(tensor: nn.Parameter, lr: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor], lr=lr, betas=BETAS, weight_decay=decay, fused=True)


def _adafactor(tensor: nn.Parameter, lr: float, decay: float) -> torch.optim.Optimizer:
    """Adafactor (1804.04235) with steps of AdamW's size: relative to 1 and not to the weights' own size."""
    return torch.optim.Adafactor([tensor], lr=lr, eps=(None, 1.0), weight_decay=decay)


_MAKERS: dict[str, Callable[[nn.Parameter, float, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "none": lambda tensor, lr, decay: torch.optim.SGD([tensor], lr=lr, weight_decay=decay),  # holds nothing
}


class TensorwiseOptimizer(torch.optim.Optimizer):
    """Steps one tensor at a time by the `rule` of its group.

    packed: moments rest in eight bits. offload: moments and a float32 copy of the weights rest in main memory, where the step is
    computed. Weights in bfloat16 without such a copy are rounded at random.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, packed: bool = False, offload: bool = False):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "rule": "adamw"})
        self.packed, self.offload = packed, offload
        self._squares: list[Tensor] = []
        self._clip = 0.0
        self._hooks: list[RemovableHandle] = []

    def home(self, parameter: Tensor) -> torch.device:
        """Return where a parameter's state rests."""
        return torch.device("cpu") if self.offload else parameter.device

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every tensor that has a gradient, and give the gradient back."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_tensor(parameter, group)

    @torch.no_grad()
    def step_tensor(self, parameter: nn.Parameter, group: dict[str, Any], scale: Tensor | float = 1.0) -> None:
        """Step one tensor, its gradient multiplied by `scale`."""
        assert parameter.grad is not None
        home, state = self.home(parameter), dict(self.state[parameter])
        master, norm = state.pop(MASTER, None), state.pop(NORM, None)
        value = parameter.detach().to(home, torch.float32, copy=True) if master is None else master
        tensor = nn.Parameter(value)
        tensor.grad = parameter.grad.detach().to(home, torch.float32) * scale
        parameter.grad = None
        rule = _MAKERS[group["rule"]](tensor, group["lr"], group["weight_decay"])
        if state:
            rule.state[tensor] = unpack(state, tensor.shape)
        rule.step()
        state = dict(rule.state[tensor])
        self.state[parameter] = pack(state) if self.packed else state
        if self.offload:
            self.state[parameter][MASTER] = tensor.detach()
        if norm is not None:
            self.state[parameter][NORM] = norm
        self._put(parameter, tensor.detach())

    def _put(self, parameter: nn.Parameter, value: Tensor) -> None:
        if parameter.dtype == torch.bfloat16 and not self.offload:
            parameter.copy_(round_at_random(value))
        else:
            parameter.copy_(value)

    # ---- steps in the backward pass

    def step_in_backward(self, clip: float) -> None:
        """From now on step each tensor as soon as its gradient is there, once in every backward pass."""
        self._clip = clip
        for group in self.param_groups:
            for parameter in group["params"]:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._stepper(group)))

    @property
    def steps_in_backward(self) -> bool:
        """Return whether backward passes make the steps."""
        return bool(self._hooks)

    def leave_backward(self) -> None:
        """Let later backward passes step nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _stepper(self, group: dict[str, Any]) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
            square = parameter.grad.detach().float().square().sum()
            self._squares.append(square)
            self.step_tensor(parameter, group, self._scale(square))

        return step

    def _scale(self, square: Tensor) -> Tensor:
        """Return what a gradient is multiplied with: 0 where it is not finite, so that its tensor stays as it was.

        The whole gradient's norm is known only after the last tensor, so clipping goes by the step before; in the first, each tensor is
        clipped alone.
        """
        norm = square.sqrt()
        if NORM in (kept := self.state[self._first()]):
            norm = kept[NORM].to(square)
        scale = (self._clip / norm.clamp_min(1e-12)).clamp(max=1.0) if self._clip else torch.ones_like(square)
        return torch.where(square.isfinite(), scale, torch.zeros_like(scale))

    def norm_of_backward(self) -> Tensor:
        """Return the norm of the gradient whose steps the backward pass has taken."""
        total = torch.stack([s.to(self._squares[0].device) for s in self._squares]).sum().sqrt()
        self._squares = []
        kept = self.state[self._first()]
        kept[NORM] = torch.where(total.isfinite(), total, kept.get(NORM, torch.ones_like(total)))
        return total

    def _first(self) -> nn.Parameter:
        """Return the parameter in whose state the norm of the last gradient is kept, so that checkpoints have it."""
        return self.param_groups[0]["params"][0]
