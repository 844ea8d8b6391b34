"""Choose the next token: greedily, or by temperature and top-p from random numbers that belong to a sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.errors import UserError

# B sequences, V vocabulary


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_p keeps the likeliest tokens up to that mass; beams > 1 is beam search."""

    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative; found {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1]; found {self.top_p:g}")
        if not 1 <= self.beams <= 16:
            raise UserError(f"beams must lie between 1 and 16; found {self.beams}")
        if self.beams > 1 and self.temperature > 0:
            raise UserError(
                f"beam search chooses by likelihood and draws nothing; give temperature 0 with beams={self.beams}"
            )


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return p [B, V] with 0 for all but the likeliest tokens that together reach `top_p` (1904.09751).

    It is not renormalised.
    """
    if top_p >= 1:
        return p
    values, order = p.sort(-1, descending=True)
    before = values.cumsum(-1) - values
    return torch.zeros_like(p).scatter_(1, order, values.masked_fill(before >= top_p, 0.0))


def choose(logits: Tensor, sampling: Sampling, u: Tensor) -> Tensor:
    """Return next tokens [B] from logits [B, V] and uniform numbers u [B].

    It inverts the cumulative distribution.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = nucleus((logits.double() / sampling.temperature).softmax(-1), sampling.top_p)
    cumulative = p.cumsum(-1)
    at = torch.searchsorted(cumulative, (u.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = p.shape[1] - 1 - p.flip(1).gt(0).int().argmax(1)  # rounding must not go past the last possible token
    return torch.minimum(at, last)
