"""Round a weight matrix to few bits so that its layer's output changes least on calibration text.

Method: GPTQ (Frantar et al., arXiv 2210.17323), columns in order of their input energy, scales fixed before the first
column; each scale is searched for the least weighted squared error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# O rows (outputs), I columns (inputs), G groups of columns that share a scale


@dataclass(frozen=True)
class Rounded:
    """codes [O, I] int8 and scale [O, G]; the weight reads back as codes * scale of its group."""

    codes: Tensor
    scale: Tensor

    def weight(self) -> Tensor:
        """Return the weight as it reads back, fp32 [O, I]."""
        group = self.codes.shape[1] // self.scale.shape[1]
        return self.codes.float() * self.scale.float().repeat_interleave(group, 1)

    def moved(self, device: torch.device) -> "Rounded":
        """Return the same on a device."""
        return Rounded(self.codes.to(device), self.scale.to(device))


def search_scales(weight: Tensor, energy: Tensor, bits: int, group: int, dtype: torch.dtype, steps: int = 20) -> Tensor:
    """Return scales [O, G], representable in `dtype`: of `steps` clippings from none to 60%, those of least weighted error.

    weight [O, I] fp32 or fp64; energy [I], the mean square of each input.
    """
    top = 2 ** (bits - 1) - 1
    parts = weight.reshape(weight.shape[0], -1, group)
    weigh = energy.reshape(1, -1, group)
    full = parts.abs().amax(-1).clamp_min(1e-8) / (top + 0.5)
    best = torch.full_like(full, float("inf"))
    scale = full.to(dtype).to(full.dtype)
    for step in range(steps):
        tried = (full * (1 - 0.4 * step / steps)).to(dtype).to(full.dtype)
        read = (parts / tried[..., None]).round().clamp(-top - 1, top) * tried[..., None]
        error = ((read - parts).square() * weigh).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale


def round_weight(
    weight: Tensor, gram: Tensor, bits: int, group: int, dtype: torch.dtype = torch.bfloat16, block: int = 128
) -> Rounded:
    """Round weight [O, I] to `bits` with one scale per `group` columns, given the inputs' mean Gram matrix [I, I].

    Each rounded column's error is carried onto the columns not yet rounded, through the inverse Gram matrix's Cholesky
    factor. Inputs that calibration never saw are rounded to nearest.
    """
    top = 2 ** (bits - 1) - 1
    energy = gram.diagonal()
    scale = search_scales(weight, energy + 0.01 * energy.mean().clamp_min(1e-8), bits, group, dtype)
    order = energy.argsort(descending=True)
    column_scale = scale.repeat_interleave(group, 1)[:, order]
    work = weight[:, order].clone()
    factor = _inverse_factor(gram[order][:, order]).to(weight.dtype)
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], block):
        end = min(start + block, work.shape[1])
        errors = torch.empty_like(work[:, start:end])
        for i in range(start, end):
            s = column_scale[:, i]
            codes[:, i] = (work[:, i] / s).round().clamp(-top - 1, top)
            errors[:, i - start] = (work[:, i] - codes[:, i] * s) / factor[i, i]
            work[:, i + 1 : end] -= errors[:, i - start, None] * factor[i, i + 1 : end]
        work[:, end:] -= errors @ factor[start:end, end:]
    return Rounded(codes[:, order.argsort()].to(torch.int8), scale.to(dtype))


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix [I, I], computed in fp64 where it is small enough."""
    exact = gram.double() if gram.shape[0] <= 4096 else gram.float()
    damp = 0.01 * exact.diagonal().mean().clamp_min(1e-8)
    exact = exact + damp * torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(exact))
    return torch.linalg.cholesky(inverse, upper=True)
