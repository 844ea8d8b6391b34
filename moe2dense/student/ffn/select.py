"""Keep the best neurons of all experts, scored one by one: the method `select`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, Experts, concatenate, dense
from moe2dense.student.ffn.task import FFNTask, SourcedFFN


def best_neurons(scores: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return (expert [count], neuron [count]) of the highest `scores` (one [F] tensor per expert), ordered by expert, then neuron.

    With output energy as the score this is the ranking of CAMERA (arXiv 2508.02322), over all experts at once.
    """
    width = len(scores[0])
    best = torch.stack(list(scores)).flatten().topk(count).indices.sort().values
    return best // width, best % width


def gather(experts: Experts, expert: Tensor, neuron: Tensor, scale: Tensor) -> DenseFFN:
    """Return the neurons (expert[i], neuron[i]) side by side, those of expert e scaled by scale[e]; each expert is read once.

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


def gather_routed(task: FFNTask, expert: Tensor, neuron: Tensor) -> DenseFFN:
    """Return neurons of the routed experts side by side, each writing with its expert's mean routing weight."""
    if not task.input_scaled:
        return gather(task.experts, expert, neuron, task.alpha)
    assert task.stats is not None
    weight, load = task.stats.mean_weight.float(), task.stats.load.float()
    ffn = gather(task.experts, expert, neuron, load)  # the routing weight multiplies the expert's input
    by_neuron = weight[expert, None].to(ffn.gate)
    ffn.gate, ffn.up = ffn.gate * by_neuron, ffn.up * by_neuron
    return ffn


def select_method(task: FFNTask, width: int) -> SourcedFFN:
    """Keep the neurons of highest output energy, at most `width` of them."""
    expert, neuron = best_neurons(task.energies, min(width, sum(len(e) for e in task.energies)))
    return SourcedFFN(gather_routed(task, expert, neuron), expert, neuron)
