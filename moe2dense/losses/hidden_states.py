"""Match hidden states of chosen layers: relative squared error or cosine, with projectors where widths differ.

FitNets (1412.6550) for hints with projectors, Patient-KD (1908.09355) and TinyBERT (1909.10351) for the layer maps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe2dense.losses.feature_spec import layer_pairs

# n tokens, m of them counted, N blocks, S block length, H hidden size


@dataclass
class Tokens:
    """The n = N S tokens of a forward pass."""

    # [n], 0 where masked; they sum to the pass's share of the whole step
    weights: Tensor
    # makes `seen`, which only relations between tokens need: it grows with the square of a block's length
    pairs: Callable[[], Tensor]

    @cached_property
    def seen(self) -> Tensor:
        """Return [N, S, S] bool: which tokens (columns) a token may attend to."""
        return self.pairs()


def token_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return [n]: each token's squared error relative to its teacher state, so that layers and outlying tokens weigh alike.

    An error e beyond the size of the state grows linearly: 2 (sqrt(1 + e) - 1), the pseudo-Huber loss, which is e where e is
    small. Deep models write states hundreds of times the usual size for a few tokens ("massive activations", 2402.17762). A
    student that does so for another token has an error of 10^4 to 10^5 there, and its square alone would decide the step.
    """
    error = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    return 2 * error / ((1 + error).sqrt() + 1)


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return [n]: 1 - cosine."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def make_projector(student: int, teacher: int) -> nn.Module:
    """Return a map from the student's width to the teacher's: the identity, or a linear map that starts orthogonal."""
    if student == teacher:
        return nn.Identity()
    linear = nn.Linear(student, teacher, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


class HiddenMatch(nn.Module):
    """The loss between hidden states of chosen layers, each pair of layers with its own projector.

    student and teacher: (layers, hidden size); kind: mse or cosine. With the layer map `learned` every student layer learns
    from a mixture of all teacher layers, whose weights are trained too (softmax, uniform at the start).
    """

    def __init__(self, layer_map: str, kind: str, student: tuple[int, int], teacher: tuple[int, int], heads: int = 1):
        super().__init__()
        (student_layers, student_width), (teacher_layers, teacher_width) = student, teacher
        self.measure = token_mse if kind == "mse" else token_cosine
        self.learned = layer_map == "learned"
        if self.learned:
            self.pairs = [(i, -1) for i in range(student_layers)]
            self.layers = list(range(teacher_layers))
            self.mixture = nn.Parameter(torch.zeros(student_layers, teacher_layers))
        else:
            self.pairs = layer_pairs(layer_map, student_layers, teacher_layers)
        self.projectors = nn.ModuleList(make_projector(student_width, teacher_width) for _ in self.pairs)

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tokens) -> Tensor:
        """Return the mean over layer pairs of the tokens' weighted sum; states [n, H] by name."""
        counted = tokens.weights > 0
        weights = tokens.weights[counted]
        total = weights.new_zeros(())
        for i, (s, t) in enumerate(self.pairs):
            goal = self._mixture(i, teacher, counted) if self.learned else teacher[f"hidden-{t}"][counted]
            if len(weights):
                own = self.projectors[i](student[f"hidden-{s}"][counted])
                total = total + (self.measure(own, goal) * weights).sum()
        return total / len(self.pairs)

    def _mixture(self, layer: int, teacher: dict[str, Tensor], counted: Tensor) -> Tensor:
        """Return what a student layer learns from: the weighted sum of all teacher layers' states [m, H]."""
        shares = self.mixture[layer].softmax(-1)
        goal = sum(shares[j] * teacher[f"hidden-{j}"][counted] for j in self.layers)
        assert isinstance(goal, Tensor)
        return goal
