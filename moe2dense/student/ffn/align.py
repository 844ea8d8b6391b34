"""`aligned-average`: permute each expert's neurons onto a reference expert's before averaging."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe2dense.student.ffn.average import average
from moe2dense.student.ffn.dense import DenseFFN, Experts, GatedFFN, dense


def neuron_match(expert: GatedFFN, reference: GatedFFN) -> Tensor:
    """The permutation p [F] with expert neuron p[j] in the place of the reference's neuron j, matching as well as one can.

    It maximises the sum of inner products of the neurons' gate, up and down weights (the weight matching of Git Re-Basin, Ainsworth et al.,
    arXiv 2209.04836, exact for one FFN), each kind scaled to unit mean square so that none rules. Solved by scipy's assignment.
    """

    def features(ffn: GatedFFN) -> Tensor:
        kinds = [ffn.gate, ffn.up, ffn.down.T]
        return torch.cat(
            [k.cpu().double() / k.cpu().double().pow(2).mean().sqrt().clamp_min(1e-30) for k in kinds], dim=1
        )

    likeness = features(reference) @ features(expert).T
    _, columns = linear_sum_assignment(likeness.numpy(force=True), maximize=True)
    return torch.as_tensor(columns)


def aligned_average(experts: Experts, alpha: Tensor, weighted: bool = True) -> DenseFFN:
    """The mean of the experts after their neurons are matched to those of the most used one (MC-SMoE, arXiv 2310.01334)."""
    reference = experts[int(alpha.argmax())]
    aligned = [dense(experts[e], rows=neuron_match(experts[e], reference)) for e in range(len(alpha))]
    return average(aligned, alpha, weighted)
