"""Compute the feature losses of a text such as `mse:uniform@0.1+attention:last` between a student and a teacher.

losses/registry.py lists the kinds, losses/feature_spec.py reads the text.
"""

import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe2dense.losses.feature_spec import parse_features, student_features, teacher_features
from moe2dense.losses.hidden_states import Tokens
from moe2dense.losses.registry import FEATURE_KINDS


class FeatureMatch(nn.Module):
    """All terms of a text such as `mse:uniform+attention:last`, between a student and a teacher.

    student and teacher: (layers, hidden size). heads: the student's attention heads, into which relations are split as far
    as both widths allow. `student_features` and `teacher_features` name what it reads of each.
    """

    def __init__(self, text: str, student: tuple[int, int], teacher: tuple[int, int], heads: int):
        super().__init__()
        layers = (student[0], teacher[0])
        self.student_features = student_features(text, *layers)
        self.teacher_features = teacher_features(text, *layers)
        self.terms = nn.ModuleList(
            pkgutil.resolve_name(FEATURE_KINDS[f.kind].implementation)(f.layer_map, f.kind, student, teacher, heads)
            for f in parse_features(text)
        )

    def forward(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the terms, differentiable, and their plain sum; terms of weight 0 are left out."""
        weighted = [(w, term) for w, term in zip(weights, self.terms, strict=True) if w]
        values = [term(student, teacher, tokens) for _, term in weighted]
        total: Any = sum(w * value for (w, _), value in zip(weighted, values, strict=True))
        return total, torch.stack([value.detach() for value in values]).sum()
