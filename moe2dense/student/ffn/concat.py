"""`concat`: keep the best experts whole, side by side."""

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, Experts, concatenate, dense

SCALES = ("1/K", "alpha")


def scales(alpha: Tensor, keep: Tensor, scale: str) -> Tensor:
    """Factors [len(keep)] of the kept experts' outputs; both kinds add up to alpha's sum, the weight a token's experts share.

    1/K: equal shares (Kim et al., arXiv 2605.28207; literally 1/K where routing weights are normalised). alpha: in proportion to the experts'
    mean routing weights, so that keeping all of them gives the mean-routed block sum_e alpha_e f_e(x).
    """
    if scale == "1/K":
        return alpha.sum().expand(len(keep)) / len(keep)
    return alpha[keep] * (alpha.sum() / alpha[keep].sum().clamp_min(1e-30))


def concat(experts: Experts, alpha: Tensor, keep: Tensor, scale: str = "1/K") -> DenseFFN:
    """The experts `keep` [K] as one FFN of K times their width, each output scaled (see `scales`); alpha [E]."""
    factors = scales(alpha, keep, scale)
    return concatenate([dense(experts[e], float(f)) for e, f in zip(keep.tolist(), factors, strict=True)])


def best_part(width: int, expert_width: int) -> int:
    """How many whole experts fit in `width` neurons, at least one."""
    return max(1, width // expert_width)


def trim(ffn: DenseFFN, energy: Tensor, width: int) -> tuple[DenseFFN, Tensor]:
    """`ffn` cut to its `width` neurons of most `energy` [M], and their indices, ascending."""
    rows = torch.arange(ffn.width) if width >= ffn.width else energy.topk(width).indices.sort().values
    return dense(ffn, rows=rows), rows
