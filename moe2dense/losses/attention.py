"""Attention transfer: the student's attention maps learn the teacher's (TinyBERT, 1909.10351; as KL, MiniLM, 2002.10957)."""

import torch
from torch import Tensor

from moe2dense.errors import UserError

# N blocks, n = N S tokens, hs and ht heads, S block length


def group_heads(maps: Tensor, heads: int) -> Tensor:
    """Attention maps [n, h, ...] of neighbouring heads averaged into `heads` of them. Raises UserError if h is no multiple."""
    if maps.shape[1] % heads:
        raise UserError(
            f"attention transfer: {maps.shape[1]} heads cannot be grouped into {heads}; one must divide the other"
        )
    return maps.unflatten(1, (heads, -1)).mean(2)


def token_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """[n]: mean over heads of KL(teacher || student) between the rows of attention maps, [n, hs, S] and [n, ht, S].

    Heads are grouped to the smaller of the two numbers.
    """
    heads = min(student.shape[1], teacher.shape[1])
    s, t = group_heads(student, heads), group_heads(teacher, heads)
    # masked columns are 0 in both; xlogy keeps them 0
    return (torch.xlogy(t, t) - t * s.clamp(min=torch.finfo(s.dtype).tiny).log()).sum(-1).mean(1)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over heads and counted rows of KL(teacher || student) between attention maps [N, h, S, S] of probabilities.

    mask [N, S] bool: the rows (queries) that count.
    """
    found = token_attention(*(x.transpose(1, 2).flatten(0, 1) for x in (student, teacher)))
    return found.mean() if mask is None else found[mask.flatten()].sum() / mask.sum().clamp(min=1)
