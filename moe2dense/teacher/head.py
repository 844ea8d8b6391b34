"""The language model head: from final hidden states to logits, a slice of the vocabulary at a time."""

from typing import Any

import torch
from torch import Tensor

_SLICE_BYTES = 64_000_000


def logit_scale(config: Any) -> float:
    """What a family multiplies its logits with: granite divides by `logits_scaling`, cohere multiplies with `logit_scale`."""
    divide, times = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    return float(times or 1.0) / float(divide or 1.0)


class LMHead:
    """logits = softcap(scale * (hidden @ weight.T + bias)). `weight` [V, H] is converted to the compute dtype when asked for."""

    def __init__(
        self,
        stored: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.stored, self.scale, self.softcap, self.dtype = stored, scale, softcap, dtype
        self.bias = None if bias is None else bias.to(dtype)
        self._weight: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """[V, H], kept once made."""
        if self._weight is None:
            self._weight = self.stored.to(self.dtype)
        return self._weight

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] -> [.., V] without ever holding a converted copy of the weight."""
        flat = hidden.reshape(-1, hidden.shape[-1]).to(self.stored.device, self.dtype)
        out = flat.new_empty(flat.shape[0], self.stored.shape[0])
        step = max(256, _SLICE_BYTES // (self.stored.shape[1] * self.dtype.itemsize))
        for a in range(0, self.stored.shape[0], step):
            part = self.stored[a : a + step].to(self.dtype)  # [v, H]
            bias = None if self.bias is None else self.bias[a : a + step]
            out[:, a : a + step] = torch.nn.functional.linear(flat, part, bias)
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out.view(*hidden.shape[:-1], -1)
