"""Keep the best experts whole, side by side: the method `concat`."""

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.student.ffn.dense import DenseFFN, Experts, concatenate, dense
from moe2dense.student.ffn.routed import folded
from moe2dense.student.ffn.scores import best_experts
from moe2dense.student.ffn.task import FFNTask, SourcedFFN

SCALES = ("1/K", "alpha")


def scales(alpha: Tensor, keep: Tensor, scale: str) -> Tensor:
    """Return factors [len(keep)] of the kept experts' outputs; both kinds add up to alpha's sum, all that a token's experts weigh.

    1/K: equal shares (Kim et al., arXiv 2605.28207; literally 1/K where routing weights are normalised). alpha: in proportion to the experts'
    mean routing weights, so that keeping all of them gives the mean-routed block sum_e alpha_e f_e(x). Raises UserError for another scale.
    """
    if scale not in SCALES:
        raise UserError(f"build.scale is {scale!r}; choose one of {', '.join(SCALES)}")
    if scale == "1/K":
        return alpha.sum().expand(len(keep)) / len(keep)
    return alpha[keep] * (alpha.sum() / alpha[keep].sum().clamp_min(1e-30))


def concat(experts: Experts, alpha: Tensor, keep: Tensor, scale: str = "1/K") -> DenseFFN:
    """Return the experts `keep` [K] as one FFN of K times their width, each output scaled (see `scales`); alpha [E]."""
    factors = scales(alpha, keep, scale)
    return concatenate([dense(experts[e], float(f)) for e, f in zip(keep.tolist(), factors, strict=True)])


def concat_method(task: FFNTask, width: int) -> SourcedFFN:
    """Keep the best experts whole; where the width is no multiple of theirs, the best of the last one's neurons fill it."""
    assert task.stats is not None
    size = task.experts[0].gate.shape[0]
    count = min(len(task.experts), max(1, -(-width // size)))
    keep = best_experts(task.stats, count, task.config.score, task.probability)
    ffn = concat(*folded(task), keep, task.config.scale)
    expert, neuron = keep.repeat_interleave(size), torch.arange(size).repeat(count)
    if ffn.width <= width:
        return SourcedFFN(ffn, expert, neuron)
    scores = torch.cat([task.energies[e] for e in keep.tolist()])
    rows = scores.topk(width).indices.sort().values
    return SourcedFFN(dense(ffn, rows=rows), expert[rows], neuron[rows])
