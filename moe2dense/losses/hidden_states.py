"""Losses between hidden states of chosen layers: relative squared error or cosine, with projectors and layer maps.

FitNets (1412.6550) for hints with projectors, Patient-KD (1908.09355) and TinyBERT (1909.10351) for the layer maps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe2dense.errors import UserError

# n tokens, Hs and Ht hidden sizes, Ls and Lt numbers of layers


@dataclass
class Tokens:
    """The n = N S tokens of a forward pass: weights [n], 0 where masked, which sum to the pass's share of the whole step;
    seen [N, S, S] bool: which tokens (columns) a token may attend to."""

    weights: Tensor
    seen: Tensor


def token_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """[n]: squared error of each token relative to its teacher's state, so that layers and outlying tokens weigh alike."""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """[n]: 1 - cosine."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def make_projector(student: int, teacher: int) -> nn.Module:
    """From the student's width to the teacher's: nothing when they agree, else a linear map that starts orthogonal."""
    if student == teacher:
        return nn.Identity()
    linear = nn.Linear(student, teacher, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


def layer_pairs(spec: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Which student layer learns from which teacher layer (counted from 0; -1 is the last).

    `uniform`: every student layer, spread evenly to the last of both; `even:k`: k of these, spread evenly to the last; `last:k`: the last k
    of both; `0=1,3=7`: as written.
    Raises UserError for anything else or layers that are not there.
    """
    everywhere = [(i, round((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers)]
    if spec == "uniform":
        return everywhere
    name, _, count = spec.partition(":")
    try:
        if name == "even":
            k = min(int(count), student_layers)
            pairs = [everywhere[round((i + 1) * student_layers / k) - 1] for i in range(k)]
        elif name == "last":
            k = int(count or 1)
            pairs = [(student_layers - 1 - i, teacher_layers - 1 - i) for i in reversed(range(k))]
        else:
            written = [part.split("=") for part in spec.split(",")]
            pairs = [(int(s) % student_layers if int(s) < 0 else int(s), int(t)) for s, t in written]
            pairs = [(s, t % teacher_layers if t < 0 else t) for s, t in pairs]
    except ValueError:
        raise UserError(
            f"layer map {spec!r} must be uniform, learned, even:K, last:K or pairs such as 0=1,3=7"
        ) from None
    if not pairs or any(not (0 <= s < student_layers and 0 <= t < teacher_layers) for s, t in pairs):
        raise UserError(
            f"layer map {spec!r} names layers outside {student_layers} (student) and {teacher_layers} (teacher)"
        )
    return pairs


class HiddenMatch(nn.Module):
    """The loss between the student's states of some layers and the teacher's, [n] tokens, each pair with its own projector.

    With `spec` "learned" every student layer learns from a mixture of all teacher layers, whose weights train too
    (softmax, uniform at the start).
    """

    def __init__(self, spec: str, kind: str, student: tuple[int, int], teacher: tuple[int, int]):
        super().__init__()
        (student_layers, student_width), (teacher_layers, teacher_width) = student, teacher
        self.measure = token_mse if kind == "mse" else token_cosine
        self.learned = spec == "learned"
        if self.learned:
            self.pairs = [(i, -1) for i in range(student_layers)]
            self.layers = list(range(teacher_layers))
            self.mixture = nn.Parameter(torch.zeros(student_layers, teacher_layers))
        else:
            self.pairs = layer_pairs(spec, student_layers, teacher_layers)
        self.projectors = nn.ModuleList(make_projector(student_width, teacher_width) for _ in self.pairs)

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        """student and teacher: states [n, H] by name. The mean over the pairs of the tokens' weighted sum."""
        kept = tokens.weights > 0
        weights = tokens.weights[kept]
        total = weights.new_zeros(())
        for i, (s, t) in enumerate(self.pairs):
            if self.learned:
                mix = self.mixture[i].softmax(-1)
                goal = sum(mix[j] * teacher[f"hidden-{j}"][kept] for j in self.layers)
            else:
                goal = teacher[f"hidden-{t}"][kept]
            assert isinstance(goal, Tensor)
            if len(weights):
                total = total + (self.measure(self.projectors[i](student[f"hidden-{s}"][kept]), goal) * weights).sum()
        return total / len(self.pairs)
