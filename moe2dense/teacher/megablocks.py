"""Run the routed experts of a layer through megablocks' dropless grouped MLP (Gale et al., arXiv:2211.15841). Optional, CUDA only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe2dense.teacher.experts import LayerExperts

# E experts, F expert width, H hidden, K top_k


def build(experts: LayerExperts, top_k: int, device: torch.device) -> Any:
    """Build a ParallelDroplessMLP with this layer's weights: w1 = gate, v1 = up, w2 = down transposed, experts one after another [E * F, H]."""
    from megablocks.layers.arguments import Arguments  # pyright: ignore[reportMissingImports]
    from megablocks.layers.dmoe import ParallelDroplessMLP  # pyright: ignore[reportMissingImports]

    half = experts.dtype == torch.bfloat16
    module = ParallelDroplessMLP(
        Arguments(
            hidden_size=experts[0].stored[0].shape[1], ffn_hidden_size=experts.width, bias=False, return_bias=False,
            activation_fn=silu, moe_num_experts=len(experts), moe_top_k=top_k, mlp_type="glu", mlp_impl="grouped",
            fp16=False, bf16=half, device=device, init_method=lambda weight: None,
        )
    )  # fmt: skip
    module.requires_grad_(False)
    for e, expert in enumerate(experts):
        rows = slice(e * experts.width, (e + 1) * experts.width)
        module.mlp.w1[rows], module.mlp.v1[rows] = expert.gate, expert.up
        module.mlp.w2[rows] = expert.down.T
    return module


@torch.no_grad()
def run(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return sum_e w_te f_e(x_t) of x [T, H]; index and weights [T, K]."""
    return module.forward_once(x.contiguous(), weights, index)[0]
