"""Permute each expert's neurons onto a reference expert's, then average: the method `aligned-average`."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe2dense.student.ffn.average import average
from moe2dense.student.ffn.dense import DenseFFN, Experts, GatedWeights, dense
from moe2dense.student.ffn.energy import trim_to_width
from moe2dense.student.ffn.routed import folded
from moe2dense.student.ffn.task import FFNTask, SourcedFFN, without_source


def neuron_match(expert: GatedWeights, reference: GatedWeights) -> Tensor:
    """Return the permutation p [F] that best puts the expert's neuron p[j] in the place of the reference's neuron j.

    It maximises the sum of inner products of the neurons' gate, up and down weights (the weight matching of Git Re-Basin, Ainsworth et al.,
    arXiv 2209.04836, exact for one FFN), each kind scaled to unit mean square so that none dominates. Solved as an assignment by scipy.
    """

    def features(ffn: GatedWeights) -> Tensor:
        kinds = [ffn.gate, ffn.up, ffn.down.T]
        return torch.cat([k.double() / k.double().pow(2).mean().sqrt().clamp_min(1e-30) for k in kinds], dim=1)

    likeness = features(reference) @ features(expert).T
    _, columns = linear_sum_assignment(likeness.numpy(force=True), maximize=True)
    return torch.as_tensor(columns)


def aligned_average(experts: Experts, alpha: Tensor, weighted: bool = True) -> DenseFFN:
    """Return the mean of the experts after their neurons are matched to those of the most used one (MC-SMoE, arXiv 2310.01334)."""
    reference = experts[int(alpha.argmax())]
    aligned = [dense(experts[e], rows=neuron_match(experts[e], reference)) for e in range(len(alpha))]
    return average(aligned, alpha, weighted)


def aligned_average_method(task: FFNTask, width: int) -> SourcedFFN:
    """Return the weighted mean of the aligned experts, trimmed to the width."""
    return without_source(trim_to_width(aligned_average(*folded(task)), task.x, width))
