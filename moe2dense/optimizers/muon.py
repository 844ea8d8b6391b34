"""Muon for CPUs too: its products are in float32 there, since many CPUs multiply bfloat16 tens of times slower."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.common.counters import count_flops
from moe2dense.modeling.products import NEWTON_SCHULZ, orthogonal_flops


class Muon(torch.optim.Muon):
    """torch's Muon; matrices on a CPU are made orthogonal in float32, with the same formulas and state.

    torch does this in bfloat16 everywhere, which a CPU without such instructions multiplies 30 to 50 times slower than float32: the steps
    would take most of a training's time. Steps have the size that AdamW's have (`match_rms_adamw`).
    """

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float = 0.0, nesterov: bool = True):
        options = {"ns_steps": NEWTON_SCHULZ, "adjust_lr_fn": "match_rms_adamw"}
        super().__init__(matrices, lr, weight_decay, nesterov=nesterov, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for matrix, _, _ in stepped:
            count_flops(orthogonal_flops(matrix.shape), matrix.device.type)
        if any(matrix.device.type != "cpu" for matrix, _, _ in stepped):
            super().step()
            return loss
        for matrix, gradient, group in stepped:
            self._step_matrix(matrix, gradient, group)
        return loss

    def _step_matrix(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[matrix], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(mean, momentum) if group["nesterov"] else mean
        update = nearly_orthogonal(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def nearly_orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return `matrix` [M, N] with its singular values brought close to 1, in its own precision.

    coefficients: (a, b, c) of the odd polynomial a s + b s^3 + c s^5 that each of the `steps` applies to the singular values s, which
    the Frobenius norm, at least `eps`, divides first (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
