"""Round a teacher's experts to few bits as they are read: what a quantised copy would teach, without writing one.

The rounding is simulated, on every read, from the checkpoint that is there: nothing gets smaller on disk, and the experts are computed
in the compute dtype from their rounded values, as weight-only kernels do. Attention, norms, router, shared experts, embedding and head
are left as they are, as common recipes leave them.

int8  one symmetric scale per output row
int4  one scale and offset per 128 inputs of a row
nf4   the sixteen quantiles of a normal distribution, one scale per 64 inputs of a row (QLoRA, 2305.14314)
"""

import math
from functools import cache

import torch
from torch import Tensor

from moe2dense.teacher.experts import ExpertWeights, LayerExperts

# O outputs, I inputs of a matrix, g inputs of a group

BITS = ("int8", "int4", "nf4")
_GROUP = {"int4": 128, "nf4": 64}


@cache
def nf4_values() -> Tensor:
    """Return the sixteen values of NF4 in [-1, 1]: quantiles of a normal distribution and 0, as in QLoRA's appendix E."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = [_normal_quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    negative = [-_normal_quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    values = torch.tensor([*negative, 0.0, *positive], dtype=torch.float64).sort().values
    return (values / values.max()).float()


def _normal_quantile(p: float) -> float:
    """Return the p-quantile of the standard normal distribution."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))


def rounded(weight: Tensor, bits: str) -> Tensor:
    """Round a matrix [O, I] to `bits`, see the module, and return it in float32."""
    w = weight.float()
    if bits == "int8":
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (w / scale).round().clamp(-127, 127) * scale
    parts = [_rounded_group(part, bits) for part in w.split(_GROUP[bits], 1)]
    return torch.cat(parts, 1)


def _rounded_group(w: Tensor, bits: str) -> Tensor:
    """Round one group of inputs [O, g], with one scale per row."""
    if bits == "nf4":
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12)
        values = nf4_values()
        middles = (values[1:] + values[:-1]) / 2
        return values[torch.bucketize(w / scale, middles)] * scale
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / 15
    zero = (-low / scale).round()
    return ((w / scale + zero).round().clamp(0, 15) - zero) * scale


class QuantizedExperts(LayerExperts):
    """The routed experts of one layer with rounded matrices. An expert costs its size in float32 while it is used."""

    bits = "int8"

    def read(self, expert: int, buffer: Tensor | None = None) -> ExpertWeights:
        """Read one expert from disk and round it; its matrices are its own, not views of `buffer`."""
        stored = super().read(expert, buffer)
        g, u, d = (rounded(t, self.bits).to(self.dtype) for t in stored.stored)
        return ExpertWeights(g, u, d, self.gating, self.dtype, (stored.gate_bias, stored.up_bias, stored.down_bias))
