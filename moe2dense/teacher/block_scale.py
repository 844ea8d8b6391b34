"""Measure what an MoE block multiplies the sum of its routed experts, and its shared FFN, with.

Some families put a factor on them after they are computed (Laguna's `moe_routed_scaling_factor`, half of each in Cohere's average),
others within the routing weights. A block is run on two tokens with constants in place of its experts, so no name of a field is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.hooks import first_tensor

_EXACT = 1e-6  # a factor as near to one is one


@dataclass(frozen=True)
class BlockScale:
    """Factors of a block on the sum of its routed experts, and on its shared FFN."""

    routed: float = 1.0
    shared: float = 1.0


@torch.no_grad()
def measure_block_scale(block: nn.Module, routed: nn.Module, shared: nn.Module | None, like: Tensor) -> BlockScale:
    """Return the factors of a block whose router is in memory; `like` [H] gives size, dtype and device of a token.

    shared: the shared FFN inside the block whose output it takes as it is, where there is one.
    Raises UserError for a block that does more than multiply the sum, which no dense FFN computes.
    """
    x = torch.zeros(1, 2, len(like), dtype=like.dtype, device=like.device)

    def output(of_routed: float, of_shared: float) -> Tensor:
        def experts(tokens: Tensor, *_: Any) -> Tensor:
            return torch.full_like(tokens, of_routed)

        stand_ins: dict[nn.Module, Callable[..., Tensor]] = {routed: experts}
        if shared is not None:
            stand_ins[shared] = lambda tokens: torch.full_like(tokens, of_shared)
        with internals.forwards(stand_ins):
            return first_tensor(block(x)).float()

    once, twice = output(1.0, 0.0), output(2.0, 0.0)
    of_shared = once.new_ones(()) if shared is None else output(0.0, 1.0).mean()
    linear = (twice - 2 * once).abs() <= 1e-8 + 2e-2 * once.abs()
    even = (once - once.mean()).abs() <= 1e-2
    # one wait for a GPU
    measured = torch.stack([once.mean(), of_shared, linear.all().float(), even.all().float()]).tolist()
    if not all(measured[2:]):
        raise UserError(
            f"{type(block).__name__}: the MoE block does more with the sum of its experts than multiply it by a number "
            f"(a norm, say); a dense FFN cannot take its place"
        )
    return BlockScale(_factor(measured[0]), _factor(measured[1]))


def _factor(value: float) -> float:
    """Return a measured factor, or one where it is as near to one as arithmetic allows."""
    return 1.0 if abs(value - 1.0) < _EXACT else value
