"""Take the mean of the experts' weights: the methods `average` and `weighted-average`."""

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, Experts, dense
from moe2dense.student.ffn.energy import trim_to_width
from moe2dense.student.ffn.routed import folded
from moe2dense.student.ffn.task import FFNTask, SourcedFFN, without_source


def _mean(tensors: list[Tensor | None], shares: Tensor) -> Tensor | None:
    if tensors[0] is None:
        return None
    return torch.stack([t * s.to(t) for t, s in zip(tensors, shares, strict=True) if t is not None]).sum(0)


def average(experts: Experts, alpha: Tensor, weighted: bool = False) -> DenseFFN:
    """Return one FFN of an expert's width whose weights are the mean of the experts' (Xue et al., OneS, arXiv 2201.10890).

    `alpha` [E] is the mean routing weight of each expert over all tokens. The mean is uniform or in proportion to alpha; the
    output is multiplied by alpha's sum, the total weight a token's experts get (1 where routing weights are normalised).
    """
    total = alpha.sum()
    proportional = weighted and float(total) > 0  # experts that no token chose have no proportions
    shares = alpha / total if proportional else torch.full_like(alpha, 1 / len(alpha))
    parts = [dense(experts[e]) for e in range(len(alpha))]
    gate, up, down = (_mean([getattr(p, n) for p in parts], shares) for n in ("gate", "up", "down"))
    assert gate is not None and up is not None and down is not None
    gate_bias, up_bias, down_bias = (
        _mean([getattr(p, n) for p in parts], shares) for n in ("gate_bias", "up_bias", "down_bias")
    )
    scale = total.to(down)
    return DenseFFN(
        gate,
        up,
        down * scale,
        gate_bias,
        up_bias,
        None if down_bias is None else down_bias * scale,
        parts[0].gating,
    )


def average_method(task: FFNTask, width: int) -> SourcedFFN:
    """Return the plain mean of the experts, trimmed to the width."""
    return without_source(trim_to_width(average(*folded(task)), task.x, width))


def weighted_average_method(task: FFNTask, width: int) -> SourcedFFN:
    """Return the mean of the experts in proportion to their routing weights, trimmed to the width."""
    return without_source(trim_to_width(average(*folded(task), weighted=True), task.x, width))
