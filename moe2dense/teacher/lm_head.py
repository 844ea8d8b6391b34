"""Compute logits from final hidden states with a stored weight, a slice of the vocabulary at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product
from moe2dense.teacher.buffers import Scratch

_SLICE_BYTES = 16_000_000  # of the weight, converted at once


class LMHead:
    """A language-model head (`modeling.head.OutputHead`) that keeps its weight [V, H] as stored and converts it in slices."""

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
        """The weight [V, H] in the compute dtype; converted at first use and kept."""
        if self._weight is None:
            self._weight = self.stored.to(self.dtype)
        return self._weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [.., V] of hidden [.., H] without ever holding a converted copy of the weight."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = torch.empty(len(flat), len(self.stored), dtype=self.dtype, device=self.stored.device)
        return self._fill(flat, out, Scratch()).view(*hidden.shape[:-1], -1)

    def chunks(self, hidden: Tensor, tokens: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, logits [n, V]) of at most `tokens` rows of hidden [T, H], all in the same memory: each lasts until the next."""
        scratch = Scratch()
        for a in range(0, len(hidden), tokens):
            rows = slice(a, min(a + tokens, len(hidden)))
            out = scratch.take("logits", (rows.stop - a, len(self.stored)), self.dtype, self.stored.device)
            yield rows, self._fill(hidden[rows], out, scratch)

    @torch.no_grad()
    def _fill(self, flat: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
        """Write the logits of flat [n, H] to `out` [n, V]."""
        flat = flat.to(self.stored.device, self.dtype)
        count_flops(product(len(flat), flat.shape[1], len(self.stored)), flat.device.type)
        step = max(1, _SLICE_BYTES // (self.stored.shape[1] * self.dtype.itemsize))
        for a in range(0, len(self.stored), step):
            part = self.stored[a : a + step]  # [v, H]
            if part.dtype != self.dtype:
                part = scratch.take("weight", tuple(part.shape), self.dtype, part.device).copy_(part)
            torch.mm(flat, part.T, out=out[:, a : a + step])
        if self.bias is not None:
            out += self.bias
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out
