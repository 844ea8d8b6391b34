"""Losses on relations between tokens, which need no common width: MiniLM (2012.15828) and RKD (1904.05068)."""

import torch
from torch import Tensor
from torch.nn import functional as F

# N blocks, S block length, Ds and Dt widths, R relation heads, m vectors


def _relations(vectors: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Log of the softmax over seen tokens of scaled products [N, R, S, S] of vectors [N, S, D]."""
    split = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).log_softmax(-1)


def token_relation(student: Tensor, teacher: Tensor, heads: int, seen: Tensor) -> Tensor:
    """[N, S]: mean over R relation heads of KL(teacher || student) of self-relations of queries, keys or values [N, S, D].

    seen [N, S, S] bool: which tokens (columns) a token relates to.
    """
    log_s, log_t = _relations(student, heads, seen), _relations(teacher, heads, seen)
    return (log_t.exp() * (log_t - log_s)).masked_fill(~seen[:, None], 0.0).sum(-1).mean(1)


def minilm_relation(
    student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """The mean of `token_relation` over the tokens that count.

    mask [N, S] bool: tokens that count. causal: a token relates to itself and those before it.
    """
    mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask
    seen = mask[:, None, :].expand(-1, student.shape[1], -1)
    found = token_relation(student, teacher, heads, seen.tril() if causal else seen)
    return (found * mask).sum() / mask.sum().clamp(min=1)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between pairwise distances of m vectors [m, D], each side in units of its mean distance."""

    def distances(x: Tensor) -> Tensor:
        found = F.pdist(x)
        return found / found.mean().clamp(min=1e-12)

    return F.smooth_l1_loss(distances(student), distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of all angles that triples of m vectors [m, D] form."""

    def cosines(x: Tensor) -> Tensor:
        edges = F.normalize(x[None] - x[:, None], dim=-1, eps=1e-12)
        return edges @ edges.transpose(1, 2)

    return F.smooth_l1_loss(cosines(student), cosines(teacher))
