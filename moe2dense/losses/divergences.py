"""Compute divergences between a teacher's and a student's next-token distributions, and their gradients.

Each takes log-probabilities log_p (teacher) and log_q (student) [t, V] and returns the value per token [t] and its
gradient with respect to the student's logits [t, V]. They may overwrite their inputs. All are zero at a perfect match.
Each has a row in losses/registry.py.
"""

import functools
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

from moe2dense.losses.registry import parse_divergence

# t tokens, V vocabulary
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient with respect to the logits of q, from that of the value with respect to q; overwrite slope."""
    slope = slope.mul_(q)
    return slope.sub_(q * slope.sum(-1, keepdim=True))


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student), the teacher's entropy included (Hinton et al., arXiv 1503.02531)."""
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    return value, log_q.exp_().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(student || teacher) (MiniLLM, arXiv 2306.08543)."""
    q = log_q.exp()
    slope = log_q.sub_(log_p)
    value = (q * slope).sum(-1)
    return value, slope.sub_(value[:, None]).mul_(q)


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of forward and reverse KL."""
    ahead, ahead_grad = forward_kl(log_p.clone(), log_q.clone())
    back, back_grad = reverse_kl(log_p, log_q)
    return ahead.add_(back).mul_(0.5), ahead_grad.add_(back_grad).mul_(0.5)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share p + (1 - share) q)."""
    weights = torch.tensor([share, 1 - share], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_p + weights[0], log_q + weights[1])


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649)."""
    log_m, q = _mixture(log_p, log_q, beta), log_q.exp()
    p = log_p.exp()
    slope = log_q.sub_(log_m)
    value = beta * log_p.sub_(log_m).mul_(p).sum(-1) + (1 - beta) * (q * slope).sum(-1)
    return value, through_softmax(q, slope.mul_(1 - beta))


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898)."""
    log_m, q = _mixture(log_p, log_q, skew), log_q.exp_()
    log_ratio = log_p - log_m
    value = (log_p.exp() * log_ratio).sum(-1)
    return value, through_softmax(q, log_ratio.exp_().mul_(skew - 1))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return KL(q || (1 - skew) p + skew q): the mixture is mostly the teacher's (DistiLLM, arXiv 2402.03898)."""
    log_m, q = _mixture(log_p, log_q, 1 - skew), log_q.exp()
    log_ratio = log_q.sub_(log_m)
    value = (q * log_ratio).sum(-1)
    return value, through_softmax(q, log_ratio - skew * log_ratio.exp())


def tvd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total variation distance, half the summed absolute difference (f-DISTILL, arXiv 2307.15190)."""
    q = log_q.exp_()
    difference = q - log_p.exp_()
    value = difference.abs().sum(-1).mul_(0.5)
    return value, through_softmax(q, difference.sign_().mul_(0.5))


def cross_entropy(labels: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log q of the label [t]; labels of -100 give zero value and zero gradient."""
    known = labels >= 0
    index = labels.clamp(min=0)[:, None]
    value = -log_q.gather(1, index)[:, 0] * known
    grad = log_q.exp_()
    grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
    return value, grad.mul_(known[:, None])


def divergence(name: str) -> Divergence:
    """Return the divergence called `name`, or `name:value` where it has a parameter (`jsd:0.3`, `skew_forward_kl:0.2`).

    Raises UserError for an unknown name or a parameter outside (0, 1).
    """
    row, value = parse_divergence(name)
    function: Divergence = pkgutil.resolve_name(row.implementation)
    return function if value is None else functools.partial(function, **{row.parameter: value})
