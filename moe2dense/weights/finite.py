"""Refuse numbers that are not finite: one NaN or infinity among the weights spoils every answer, and nothing else would say so."""

import torch
from torch import Tensor

from moe2dense.errors import UserError


def all_finite(value: Tensor) -> bool:
    """Return whether no number of a tensor is NaN or infinite."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    # A sum is finite where all its terms are, and takes no memory; where it overflows each number is looked at.
    return bool(torch.isfinite(value.sum(dtype=torch.float32))) or bool(torch.isfinite(value).all())


def refuse_not_finite(value: Tensor, what: str, remedy: str) -> None:
    """Raise UserError where a tensor holds NaN or infinity. what: the subject of the sentence; remedy: its end."""
    if not all_finite(value):
        count = int((~torch.isfinite(value)).sum())
        raise UserError(
            f"{what} holds NaN or infinity ({count} of its {value.numel()} numbers), which would spoil every answer; {remedy}"
        )
