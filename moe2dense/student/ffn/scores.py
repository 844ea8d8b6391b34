"""Scores of whole experts: which to keep when only some fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = ("frequency", "cp", "acp", "do-acp", "reap")


@dataclass
class ExpertStats:
    """What a layer's routing says about its experts, over T tokens."""

    load: Tensor  # [E] share of the tokens routed to the expert
    probability: Tensor  # [E] sum over tokens of the router's probability before top-k
    weight: Tensor  # [E] sum over tokens of the routing weight w_te
    output_norm: Tensor  # [E] mean over the expert's tokens of w_te |f_e(x)|
    mean_output: Tensor  # [E, H] mean of f_e over the tokens routed to e
    tokens: int

    @property
    def alpha(self) -> Tensor:
        """[E] mean routing weight over all tokens: the honest magnitude of an expert in a dense block."""
        return self.weight / max(self.tokens, 1)


def diverse(quality: Tensor, features: Tensor, count: int) -> Tensor:
    """Indices [count] chosen greedily to raise log det(I + sum of q_e v_e v_e') most (D-optimal design), v_e unit features [E, D]."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    rows = unit * (quality.double() / quality.double().mean().clamp_min(1e-30)).sqrt()[:, None]
    inverse = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    chosen: list[int] = []
    for _ in range(count):
        gain = torch.einsum("ed,df,ef->e", rows, inverse, rows)
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        column = inverse @ rows[best]
        inverse -= torch.outer(column, column) / (1 + gain[best])
    return torch.tensor(chosen, device=quality.device)


def best_experts(stats: ExpertStats, count: int, score: str = "acp") -> Tensor:
    """Indices [count], ascending, of the experts to keep.

    frequency: tokens routed; cp, acp: router probability accumulated over all tokens, or routing weight over the expert's own; do-acp: acp made diverse
    by a D-optimal choice over mean outputs (our reading of the scores of Kim et al., arXiv 2605.28207); reap: mean of w |f(x)| over the
    expert's tokens (Lasby et al., arXiv 2510.13999).
    """
    if score == "do-acp":
        return diverse(stats.weight, stats.mean_output, count).sort().values
    values = {
        "frequency": stats.load,
        "cp": stats.probability,
        "acp": stats.weight,
        "reap": stats.output_norm,
    }[score]
    return values.topk(count).indices.sort().values
