"""Hold what is known of the teacher's distribution at each token, and compute the divergence from it.

`HiddenRows` and `LogitRows` give all log-probabilities and serve every divergence; `TopKRows` and `SampledRows` serve
forward KL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product as product_flops
from moe2dense.errors import UserError
from moe2dense.losses.divergences import Divergence, divergence
from moe2dense.losses.tiled import product
from moe2dense.modeling.head import OutputHead, head_on

# n tokens, t tokens of a tile, H teacher hidden, V vocabulary, k stored tokens per position
# log_q [r, V], rows of the tile -> value [r], gradient [r, V]
RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class TeacherRows(Protocol):
    """The teacher at n tokens."""

    @property
    def vocabulary(self) -> int | None:
        """How many ids the teacher gives a probability; None where only some are stored."""
        ...

    def __len__(self) -> int: ...
    def select(self, index: Tensor) -> "TeacherRows":
        """Return the rows of some tokens, index [m]."""
        ...

    def to(self, device: torch.device) -> "TeacherRows":
        """Return the rows on another device; a head copied there is kept for the next call."""
        ...

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        """Return the divergence of one tile, a function of the student's log-probabilities at `temperature`."""
        ...


def _dense(logits: Tensor, loss: str, temperature: float) -> RowLoss:
    compute: Divergence = divergence(loss)

    def value_and_gradient(log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        part = logits[rows, : log_q.shape[1]]
        part = part if temperature == 1.0 else part / temperature
        return compute(F.log_softmax(part, -1), log_q)

    return value_and_gradient


@dataclass
class HiddenRows:
    """Final hidden states [n, H] and the teacher's head (weight, bias, scale, softcap)."""

    hidden: Tensor
    head: OutputHead
    # hidden states and the like of some layers, [n, ...] by name
    features: dict[str, Tensor] | None = None

    @property
    def vocabulary(self) -> int | None:
        return len(self.head.weight)

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, index: Tensor) -> "HiddenRows":
        return HiddenRows(self.hidden[index], self.head)

    def to(self, device: torch.device) -> "HiddenRows":
        moved = None if self.features is None else {k: v.to(device) for k, v in self.features.items()}
        return HiddenRows(self.hidden.to(device), head_on(self.head, device), moved)

    def logits_of(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return the teacher's logits [t, V] at the tokens `rows`."""
        head = self.head
        count_flops(
            product_flops(len(self.hidden[rows]), self.hidden.shape[1], len(head.weight)), head.weight.device.type
        )
        logits = product(self.hidden[rows].to(head.weight), head.weight.T, dtype)
        if head.bias is not None:
            logits += head.bias
        if head.scale != 1.0:
            logits *= head.scale
        if head.softcap:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        return _dense(self.logits_of(rows, dtype), loss, temperature)


@dataclass
class LogitRows:
    """Logits, or log-probabilities, [n, V]."""

    logits: Tensor

    @property
    def vocabulary(self) -> int | None:
        return self.logits.shape[1]

    def __len__(self) -> int:
        return len(self.logits)

    def select(self, index: Tensor) -> "LogitRows":
        return LogitRows(self.logits[index])

    def to(self, device: torch.device) -> "LogitRows":
        return LogitRows(self.logits.to(device))

    def logits_of(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return the logits at the tokens `rows`; -inf of impossible tokens is cut, since 0 * -inf would be NaN."""
        return self.logits[rows].to(dtype).clamp(min=-1e6)

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        return _dense(self.logits_of(rows, dtype), loss, temperature)


def _check_forward_kl(loss: str, temperature: float, written: float, what: str) -> None:
    """Refuse another loss or temperature than those that the targets were written for. Raises UserError."""
    if loss != "forward_kl":
        raise UserError(f"{what} targets serve forward_kl only, found loss {loss!r}; store `hidden` or `full` targets")
    if temperature != written:
        raise UserError(
            f"{what} targets were written at temperature {written:g}, found {temperature:g}; write them again at that "
            "temperature, or store `hidden` or `full` targets"
        )


@dataclass
class TopKRows:
    """The k likeliest tokens: ids [n, k], log_p [n, k], at `temperature`.

    With `tail`, everything else is one bucket that holds the rest of the mass: the KL of the coarser distributions, a
    lower bound of the full one that is zero at a perfect match. Without, the k are renormalised, which is biased.
    """

    ids: Tensor
    log_p: Tensor
    tail: bool = True
    temperature: float = 1.0

    @property
    def vocabulary(self) -> int | None:
        return None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Tensor) -> "TopKRows":
        return TopKRows(self.ids[index], self.log_p[index], self.tail, self.temperature)

    def to(self, device: torch.device) -> "TopKRows":
        return TopKRows(self.ids.to(device), self.log_p.to(device), self.tail, self.temperature)

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        _check_forward_kl(loss, temperature, self.temperature, "topk")
        all_ids, all_log_p = self.ids[rows].long(), self.log_p[rows].to(dtype)

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            ids, log_p = all_ids[part], all_log_p[part]
            if not self.tail:
                log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            p, log_q_k = log_p.exp(), log_q.gather(1, ids)
            value = (p * (log_p - log_q_k)).sum(-1)
            q = log_q.exp_()
            q_k = q.gather(1, ids)
            if not self.tail:
                return value, q.scatter_(1, ids, q_k - p)
            q.scatter_(1, ids, 0.0)  # summed without the k, so nothing cancels
            tiny = torch.finfo(dtype).tiny
            q_tail = q.sum(-1).clamp(min=tiny)
            p_tail = (1 - p.sum(-1)).clamp(min=0)
            value = value + p_tail * (p_tail.clamp(min=tiny).log() - q_tail.log())
            return value, q.mul_((1 - p_tail / q_tail)[:, None]).scatter_(1, ids, q_k - p)

        return value_and_gradient


@dataclass
class SampledRows:
    """Tokens drawn from the teacher: ids [n, k], weights [n, k] (0 where unused), and the teacher's entropy [n].

    The weighted draws are an unbiased estimate of p, so value and gradient are unbiased for forward KL at `temperature`
    (Sparse Logit Sampling, 2503.16870).
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    temperature: float = 1.0

    @property
    def vocabulary(self) -> int | None:
        return None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Tensor) -> "SampledRows":
        return SampledRows(self.ids[index], self.weights[index], self.entropy[index], self.temperature)

    def to(self, device: torch.device) -> "SampledRows":
        return SampledRows(self.ids.to(device), self.weights.to(device), self.entropy.to(device), self.temperature)

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        _check_forward_kl(loss, temperature, self.temperature, "sampled")
        all_ids, all_weights = self.ids[rows].long(), self.weights[rows].to(dtype)
        entropy = self.entropy[rows].to(dtype)

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            ids, weights = all_ids[part], all_weights[part]
            value = -(weights * log_q.gather(1, ids)).sum(-1) - entropy[part]
            q = log_q.exp_().mul_(weights.sum(-1, keepdim=True))
            return value, q.scatter_add_(1, ids, -weights)

        return value_and_gradient
