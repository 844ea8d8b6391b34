"""Score whole experts: which to keep where only some fit."""

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.teacher.routing import LayerStats

SCORES = ("frequency", "cp", "acp", "do-acp", "reap")


def diverse(quality: Tensor, features: Tensor, count: int) -> Tensor:
    """Return indices [count] chosen greedily to raise log det(I + sum of q_e v_e v_e') most (D-optimal design), v_e unit features [E, D]."""
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


def best_experts(stats: LayerStats, count: int, score: str = "acp", probability: Tensor | None = None) -> Tensor:
    """Return the indices [count], ascending, of the experts to keep.

    frequency: tokens routed; cp, acp: router probability accumulated over all tokens (`probability` [E]), or routing weight over the expert's
    own; do-acp: acp made diverse by a D-optimal choice over mean outputs (our reading of the scores of Kim et al., arXiv 2605.28207); reap: mean of
    w |f(x)| over the expert's tokens (Lasby et al., arXiv 2510.13999). Raises UserError on another score.
    """
    if score not in SCORES:
        raise UserError(f"build.score is {score!r}; choose one of {', '.join(SCORES)}")
    if score == "do-acp":
        return diverse(stats.weight, stats.mean_output, count).sort().values
    if score == "cp" and probability is not None:
        values = probability
    else:
        values = {"frequency": stats.count, "reap": stats.reap}.get(score, stats.weight)
    return values.topk(count).indices.sort().values
