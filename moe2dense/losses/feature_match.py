"""Feature losses as a user asks for them: `KIND:MAP@WEIGHT`, several joined with `+`, each on its own layers and schedule.

mse, cosine    hidden states, with a projector where widths differ (losses/hidden_states.py)
attention      attention maps, heads grouped (losses/attention.py)
relation       relations between tokens of queries, keys and values (losses/relations.py)
rkd            distances and angles between the hidden states of a block's tokens; rkd-distance, rkd-angle: one of them
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.config.schedules import scheduled
from moe2dense.errors import UserError, nearest
from moe2dense.losses.attention import token_attention
from moe2dense.losses.hidden_states import HiddenMatch, Tokens, layer_pairs
from moe2dense.losses.relations import rkd_angle, rkd_distance, token_relation

# N blocks, S block length, n = N S tokens, m tokens of a block

KINDS = ("mse", "cosine", "attention", "relation", "rkd", "rkd-distance", "rkd-angle")
_HIDDEN = ("mse", "cosine")
_VECTORS = ("query", "key", "value")
_RKD_TOKENS = 32  # of a block: triples grow with the cube
_RKD_ANGLE = 2.0  # the angle's weight beside the distance's, as in RKD (1904.05068)


@dataclass(frozen=True)
class Feature:
    """One term: its loss, its layer map and its weight ("" = the default one)."""

    kind: str
    spec: str
    weight: str

    def reads(self, layer: int) -> tuple[str, ...]:
        """Names of what it needs of a layer."""
        if self.kind == "attention":
            return (f"maps-{layer}",)
        return tuple(f"{v}-{layer}" for v in _VECTORS) if self.kind == "relation" else (f"hidden-{layer}",)


@functools.lru_cache(maxsize=8)
def parse_features(text: str) -> tuple[Feature, ...]:
    """`mse:uniform@0.1+attention:last` as terms; the map is uniform and the weight the default unless written.

    Raises UserError for a kind that is not known, a map of another kind, or a weight that is no schedule.
    """
    found = []
    for part in text.split("+"):
        body, _, weight = part.strip().partition("@")
        kind, _, spec = body.partition(":")
        if kind not in KINDS:
            raise UserError(
                f"features {text!r} must be KIND:MAP, such as mse:uniform, or several joined with +; {kind!r} is no kind"
                f"{nearest(kind, list(KINDS))}; the kinds are {', '.join(KINDS)}"
            )
        if spec == "learned" and kind not in _HIDDEN:
            raise UserError(f"features {text!r}: a learned map mixes hidden states; use mse:learned or cosine:learned")
        if weight:
            scheduled(weight, 0, 1)
        found.append(Feature(kind, spec or "uniform", weight))
    return tuple(found)


def feature_weights(text: str, default: str, step: int, steps: int) -> tuple[float, ...]:
    """The weight of every term at a step; () when none counts."""
    found = tuple(scheduled(f.weight or default, step, steps) for f in parse_features(text)) if text else ()
    return found if any(found) else ()


def _pairs(feature: Feature, student: int, teacher: int) -> list[tuple[int, int]]:
    if feature.spec == "learned":
        return [(s, t) for s in range(student) for t in range(teacher)]
    return layer_pairs(feature.spec, student, teacher)


def _names(text: str, side: int, student: int, teacher: int) -> tuple[str, ...]:
    found = [n for f in parse_features(text) for pair in _pairs(f, student, teacher) for n in f.reads(pair[side])]
    return tuple(dict.fromkeys(found))


def teacher_features(text: str, student_layers: int, teacher_layers: int) -> tuple[str, ...]:
    """Names of what must be known of the teacher (modeling/hooks.py). Raises UserError for layers that are not there."""
    return _names(text, 1, student_layers, teacher_layers) if text else ()


class _AttentionMatch(nn.Module):
    def __init__(self, pairs: list[tuple[int, int]]):
        super().__init__()
        self.pairs = pairs

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        parts = [token_attention(student[f"maps-{s}"], teacher[f"maps-{t}"]) for s, t in self.pairs]
        # a masked row may be NaN, where softmax saw nothing
        return torch.stack([torch.where(tokens.weights > 0, p, 0.0) @ tokens.weights for p in parts]).mean()


class _RelationMatch(nn.Module):
    def __init__(self, pairs: list[tuple[int, int]], heads: int):
        super().__init__()
        self.pairs, self.heads = pairs, heads

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        total = tokens.weights.new_zeros(())
        for s, t in self.pairs:
            for what in _VECTORS:
                own, goal = student[f"{what}-{s}"], teacher[f"{what}-{t}"]
                heads = math.gcd(self.heads, own.shape[1], goal.shape[1])
                own, goal = (x.unflatten(0, tokens.seen.shape[:2]) for x in (own, goal))
                total = total + token_relation(own, goal, heads, tokens.seen).flatten() @ tokens.weights
        return total / (len(self.pairs) * len(_VECTORS))


class _RkdMatch(nn.Module):
    def __init__(self, pairs: list[tuple[int, int]], kind: str):
        super().__init__()
        self.pairs, self.kind = pairs, kind

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        total = tokens.weights.new_zeros(())
        blocks = tokens.weights.view(tokens.seen.shape[:2])
        for i, weights in enumerate(blocks):
            kept = weights.nonzero()[:, 0]
            if len(kept) < 3:
                continue
            spread = torch.linspace(0, len(kept) - 1, min(_RKD_TOKENS, len(kept)), device=kept.device).round().long()
            rows = kept[spread] + i * blocks.shape[1]
            for s, t in self.pairs:
                total = total + weights.sum() * self._loss(student[f"hidden-{s}"][rows], teacher[f"hidden-{t}"][rows])
        return total / len(self.pairs)

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "rkd-distance":
            return rkd_distance(student, teacher)
        if self.kind == "rkd-angle":
            return rkd_angle(student, teacher)
        return rkd_distance(student, teacher) + _RKD_ANGLE * rkd_angle(student, teacher)


class FeatureMatch(nn.Module):
    """All terms of a text such as `mse:uniform+attention:last`, between a student and a teacher.

    student and teacher: (layers, hidden size). heads: the student's attention heads, into which relations are split as far as
    both widths allow. `student_features` and `teacher_features` name what it reads of each.
    """

    def __init__(self, text: str, student: tuple[int, int], teacher: tuple[int, int], heads: int):
        super().__init__()
        layers = (student[0], teacher[0])
        self.student_features, self.teacher_features = (_names(text, side, *layers) for side in (0, 1))
        self.terms = nn.ModuleList(_term(f, student, teacher, heads) for f in parse_features(text))

    def forward(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the terms, differentiable, and their plain sum."""
        parts = [
            m(student, teacher, tokens) for m, w in zip(self.terms, weights, strict=True) if w
        ]  # what is not weighed is not computed
        used = [w for w in weights if w]
        total: Any = sum(w * p for w, p in zip(used, parts, strict=True))
        return total, torch.stack([p.detach() for p in parts]).sum()


def _term(feature: Feature, student: tuple[int, int], teacher: tuple[int, int], heads: int) -> nn.Module:
    if feature.kind in _HIDDEN:
        return HiddenMatch(feature.spec, feature.kind, student, teacher)
    pairs = layer_pairs(feature.spec, student[0], teacher[0])
    if feature.kind == "attention":
        return _AttentionMatch(pairs)
    return _RelationMatch(pairs, heads) if feature.kind == "relation" else _RkdMatch(pairs, feature.kind)
