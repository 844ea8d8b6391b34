"""Round numbers to bfloat16 at random, so that small steps add up instead of being lost."""

import torch
from torch import Tensor

_LOWER = 16  # bits of a float32 that bfloat16 has not


def round_at_random(value: Tensor) -> Tensor:
    """Return float32 numbers in bfloat16: each goes to a neighbour with a probability by its distance, so the mean is exact.

    Half of the lower bits are drawn and added before they are cut off (stochastic rounding; for training, Gupta et al., 1502.02551).
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << _LOWER, bits.shape, dtype=torch.int32, device=value.device)
    return ((bits + noise) & -(1 << _LOWER)).view(torch.float32).to(torch.bfloat16)
