"""Read gated feed-forward networks, single or as the experts of a layer: their matrices, their layout and their gating."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

# names of the linears of a gated FFN: gate, up, down; or gate and up in one, down
_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))
Gating = Callable[[Tensor, Tensor], Tensor]  # (gate, up) -> the neurons' activations


def _default_gate(act: Callable[[Tensor], Tensor]) -> Gating:
    """Return act(gate) * up."""

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    return apply


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a module's activation function; silu where it names none."""
    for name in ("act_fn", "activation_fn", "activation"):
        act: Any = getattr(module, name, None)
        if callable(act):
            return cast(Callable[[Tensor], Tensor], act)
    return silu


def expert_gating(experts: nn.Module) -> Gating:
    """Return how an experts module joins its gate and up projections: h = gating(gate, up)."""
    own = getattr(type(experts), "_apply_gate", None)
    if own is None or own.__name__ == "_default_apply_gate":
        return _default_gate(_activation(experts))
    side_by_side = getattr(experts, "is_concatenated", True)

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.cat((gate, up), -1) if side_by_side else torch.stack((gate, up), -1).flatten(-2)
        return own(experts, both)

    return apply


def has_plain_gating(experts: nn.Module) -> bool:
    """Return whether an experts module computes silu(gate) * up, without biases."""
    own = getattr(type(experts), "_apply_gate", None)
    if own is None or own.__name__ != "_default_apply_gate" or getattr(experts, "has_bias", False):
        return False
    probe = torch.linspace(-3, 3, 7)
    return bool(torch.allclose(_activation(experts)(probe), silu(probe)))


def expert_layout(experts: nn.Module, stacked_dispatch: bool) -> tuple[bool, bool]:
    """Return (transposed: weights are [in, out]; interleaved: gate and up rows alternate) of an experts module's parameters."""
    transposed = bool(getattr(experts, "is_transposed", stacked_dispatch))
    return transposed, not getattr(experts, "is_concatenated", True)


@dataclass(frozen=True)
class GatedLinears:
    """The pieces of a dense gated FFN module: names of its linears, and its gating."""

    gate: str
    up: str  # "" when gate and up are one linear
    down: str
    gating: Gating


def gated_linears(module: nn.Module) -> GatedLinears | None:
    """Return how to read a dense FFN module, or None when it is no gated FFN."""
    children = dict(module.named_children())
    for gate, up, down in _SPLIT:
        if {gate, up, down} <= children.keys():
            return GatedLinears(gate, up, down, _default_gate(_activation(module)))
    for gate, down in _FUSED:
        if {gate, down} <= children.keys():
            return GatedLinears(gate, "", down, _default_gate(_activation(module)))
    return None
