"""Match relations between tokens, which need no common width: MiniLMv2 (2012.15828) and RKD (1904.05068)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe2dense.losses.feature_spec import layer_pairs
from moe2dense.losses.hidden_states import Tokens

# N blocks, S block length, D width, R relation heads, m vectors
_PROJECTIONS = ("query", "key", "value")
_RKD_TOKENS = 32  # of a block: triples grow with the cube
_RKD_ANGLE = 2.0  # weight of the angle against 1 of the distance, as in RKD (1904.05068)


def _relations(vectors: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Return the log-softmax over seen tokens of scaled products [N, R, S, S] of vectors [N, S, D]."""
    split = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).log_softmax(-1)


def token_relation(student: Tensor, teacher: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Return [N, S]: mean over R relation heads of KL(teacher || student) of self-relations of vectors [N, S, D].

    The vectors are queries, keys or values. seen [N, S, S] bool: which tokens (columns) a token relates to.
    """
    log_s, log_t = _relations(student, heads, seen), _relations(teacher, heads, seen)
    return (log_t.exp() * (log_t - log_s)).masked_fill(~seen[:, None], 0.0).sum(-1).mean(1)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss between pairwise distances of m vectors [m, D], each side in units of its mean distance."""

    def distances(x: Tensor) -> Tensor:
        pairwise = F.pdist(x)
        return pairwise / pairwise.mean().clamp(min=1e-12)

    return F.smooth_l1_loss(distances(student), distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss between the cosines of all angles that triples of m vectors [m, D] form."""

    def cosines(x: Tensor) -> Tensor:
        edges = F.normalize(x[None] - x[:, None], dim=-1, eps=1e-12)
        return edges @ edges.transpose(1, 2)

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


class RelationMatch(nn.Module):
    """The loss between self-relations of chosen layers; student and teacher: (layers, hidden size).

    Vectors are split into `heads` relation heads, or as many as divide both widths.
    """

    def __init__(self, layer_map: str, kind: str, student: tuple[int, int], teacher: tuple[int, int], heads: int):
        super().__init__()
        self.pairs, self.heads = layer_pairs(layer_map, student[0], teacher[0]), heads

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        """Return the mean over layer pairs and projections of the tokens' weighted sum; vectors [n, D] by name."""
        total = tokens.weights.new_zeros(())
        for s, t in self.pairs:
            for what in _PROJECTIONS:
                own, goal = student[f"{what}-{s}"], teacher[f"{what}-{t}"]
                heads = math.gcd(self.heads, own.shape[1], goal.shape[1])
                own, goal = (x.unflatten(0, tokens.seen.shape[:2]) for x in (own, goal))
                total = total + token_relation(own, goal, heads, tokens.seen).flatten() @ tokens.weights
        return total / (len(self.pairs) * len(_PROJECTIONS))


class RkdMatch(nn.Module):
    """The loss between distances, angles or both of the hidden states of a block's tokens, at most 32 of them.

    kind: rkd, rkd-distance or rkd-angle; student and teacher: (layers, hidden size).
    """

    def __init__(self, layer_map: str, kind: str, student: tuple[int, int], teacher: tuple[int, int], heads: int):
        super().__init__()
        self.pairs, self.kind = layer_pairs(layer_map, student[0], teacher[0]), kind

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        """Return the mean over layer pairs, each block weighed by its tokens; states [n, H] by name."""
        total = tokens.weights.new_zeros(())
        blocks = tokens.weights.view(tokens.seen.shape[:2])
        for i, weights in enumerate(blocks):
            counted = weights.nonzero()[:, 0]
            if len(counted) < 3:
                continue
            count = min(_RKD_TOKENS, len(counted))
            spread = torch.linspace(0, len(counted) - 1, count, device=counted.device).round().long()
            rows = counted[spread] + i * blocks.shape[1]
            for s, t in self.pairs:
                total = total + weights.sum() * self._loss(student[f"hidden-{s}"][rows], teacher[f"hidden-{t}"][rows])
        return total / len(self.pairs)

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "rkd-distance":
            return rkd_distance(student, teacher)
        if self.kind == "rkd-angle":
            return rkd_angle(student, teacher)
        return rkd_distance(student, teacher) + _RKD_ANGLE * rkd_angle(student, teacher)
