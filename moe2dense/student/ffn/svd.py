"""Add up the experts through truncated singular value decompositions: the method `svd`."""

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, Experts, dense
from moe2dense.student.ffn.energy import trim_to_width
from moe2dense.student.ffn.routed import folded
from moe2dense.student.ffn.task import FFNTask, SourcedFFN, without_source


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of at most `rank`, in the Frobenius norm (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def svd_gather(experts: Experts, alpha: Tensor, rank: int | None = None) -> DenseFFN:
    """Return one FFN of an expert's width: the sum of the experts' matrices, each cut to its leading `rank` directions.

    SVD knowledge gathering of OneS (Xue et al., arXiv 2201.10890); by default the ranks of all experts add up to a full
    rank. Down projections carry the experts' mean routing weights `alpha` [E], so that magnitudes stay those of the block; biases are averaged.
    """
    count = len(alpha)
    parts = [dense(experts[e]) for e in range(count)]
    rank = rank or max(1, min(parts[0].gate.shape) // count)
    biases = {}
    for name in ("gate_bias", "up_bias", "down_bias"):
        values = [getattr(p, name) for p in parts]
        biases[name] = None if values[0] is None else torch.stack(values).mean(0)
    total = alpha.sum().to(parts[0].down)
    return DenseFFN(
        gate=torch.stack([truncate(p.gate, rank) for p in parts]).sum(0),
        up=torch.stack([truncate(p.up, rank) for p in parts]).sum(0),
        down=torch.stack([truncate(p.down, rank) * a.to(p.down) for p, a in zip(parts, alpha, strict=True)]).sum(0),
        gate_bias=biases["gate_bias"],
        up_bias=biases["up_bias"],
        down_bias=None if biases["down_bias"] is None else biases["down_bias"] * total,
        gating=parts[0].gating,
    )


def svd_method(task: FFNTask, width: int) -> SourcedFFN:
    """Return the sum of the low-rank experts, trimmed to the width."""
    return without_source(trim_to_width(svd_gather(*folded(task)), task.x, width))
