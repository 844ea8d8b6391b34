"""`select`: keep the best neurons of all experts, scored one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, Experts, concatenate, dense


def neuron_energy(hidden: Tensor, weights: Tensor) -> Tensor:
    """Sum over an expert's tokens of (w_t h_j(x_t))^2, [F]: hidden [n, F], routing weights [n]."""
    return (hidden * weights[:, None]).pow(2).sum(0)


def output_energy(energy: Tensor, down: Tensor) -> Tensor:
    """Energy [F] that neurons write to the output: activation energy [F] times the squared norms of down's [H, F] columns."""
    return energy * down.pow(2).sum(0).to(energy)


def best_neurons(scores: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """(expert [count], neuron [count]) of the highest `scores` (one [F] tensor per expert), ordered by expert, then neuron.

    With output energy as the score this is the ranking of CAMERA (arXiv 2508.02322), over all experts at once.
    """
    width = len(scores[0])
    best = torch.stack(list(scores)).flatten().topk(count).indices.sort().values
    return best // width, best % width


def gather(experts: Experts, expert: Tensor, neuron: Tensor, scale: Tensor) -> DenseFFN:
    """The neurons (expert[i], neuron[i]) side by side, those of expert e scaled by scale[e]; each expert is read once.

    `expert` must be ascending, so that the result keeps its order. An expert's output bias comes along, scaled, whether or
    not its neurons do: it is part of what a token gets.
    """
    assert bool((expert.diff() >= 0).all()), "neurons must be ordered by expert"
    parts, bias = [], None
    chosen = set(expert.tolist())
    has_bias = len(chosen) > 0 and experts[int(expert[0])].down_bias is not None
    for e in range(len(scale)) if has_bias else sorted(chosen):
        ffn = experts[e]
        if ffn.down_bias is not None:
            own = dense(ffn, float(scale[e]), rows=neuron[:0]).down_bias
            bias = own if bias is None or own is None else bias + own
        if e in chosen:
            parts.append(dense(ffn, float(scale[e]), rows=neuron[expert == e]))
    joined = concatenate(parts)
    joined.down_bias = bias
    return joined
