"""Scale a student's norms for a residual stream of fewer channels, whatever kind of norm they are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe2dense.common.shared_rows import mean_of_rows

# N blocks, S block length, H hidden, C channels kept


@dataclass(frozen=True)
class NormFactors:
    """What norms over the kept channels must be multiplied with to give what they give over all channels."""

    # for norms that divide by the root of the mean square, and by the standard deviation
    rms: float
    std: float


def norm_factors(hidden: Tensor, keep: Tensor, token_mask: Tensor) -> NormFactors:
    """Return the means over real tokens, of all processes, of rms(kept channels) / rms(all channels), and of std / std, of hidden [N, S, H]."""
    flat = hidden.reshape(-1, hidden.shape[-1])[token_mask].double()

    def ratio(values: Tensor) -> float:
        kept, every = values[:, keep], values
        return float(mean_of_rows((kept.pow(2).mean(1) / every.pow(2).mean(1).clamp_min(1e-30)).sqrt()))

    def std_ratio(values: Tensor) -> float:
        kept, every = values[:, keep].var(1, correction=0), values.var(1, correction=0)
        return float(mean_of_rows((kept / every.clamp_min(1e-30)).sqrt()))

    return NormFactors(ratio(flat), std_ratio(flat))


@torch.no_grad()
def scale_norms(module: nn.Module, channels: int, factors: NormFactors) -> None:
    """Scale the norms over `channels` channels among the children of a decoder layer, or of a group of norms; biases stay.

    Whether a norm subtracts the mean, and whether it multiplies with its weight or with one plus it, is found by running it.
    """
    for name, norm in module.named_children():
        weight = norm._parameters.get("weight")
        if "norm" not in name or weight is None or weight.shape != (channels,):
            continue
        factor = factors.std if _subtracts_mean(norm) else factors.rms
        offset = _offset(norm)
        weight.copy_((weight + offset) * factor - offset)


def _run(norm: nn.Module, weight: float, shift: float = 0.0) -> Tensor:
    """Return what a norm makes of a fixed vector, moved by `shift`, if all its weights were `weight` and its biases zero."""
    parameters = {n: torch.full_like(p, weight if n == "weight" else 0.0) for n, p in norm.named_parameters()}
    size = next(iter(parameters.values()))
    ramp = torch.linspace(-1.0, 2.0, len(size), dtype=size.dtype, device=size.device)[None]
    return functional_call(norm, parameters, (ramp + shift,))


def _subtracts_mean(norm: nn.Module) -> bool:
    return torch.allclose(_run(norm, 1.0), _run(norm, 1.0, shift=3.0), rtol=1e-3, atol=1e-3)


def _offset(norm: nn.Module) -> float:
    """Return 1 for a norm that multiplies with one plus its weight, 0 for one that multiplies with its weight."""
    return 0.0 if bool((_run(norm, 0.0) == 0).all()) else 1.0
