"""Unpack and pack the log-probabilities of a captured set, as its settings (settings.py) say.

Of each position, in this order: the first exact_k values; the coefficients of a curve over the rank of the others; of each bin a
scale and whole numbers, which times the scale are what the curve leaves. With delta encoding the values are the steps from one rank to
the next. Computed in float32, where DistillKit rounds to the dtype that it stores.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moe2dense.distillation.targets.captured.bits import pack, unpack
from moe2dense.distillation.targets.captured.settings import DTYPES, Bin, OlderPacking, Packing

# n positions, k tokens of each, r of them not exact, T terms of the curve


def unpack_log_p(packed: np.ndarray, packing: Packing) -> Tensor:
    """Return log-probabilities [n, k] float32, likeliest first, of bytes [n, B]. Raises ValueError where the bytes do not fit."""
    if packed.shape[1] != packing.log_p_bytes:
        raise ValueError(f"{packed.shape[1]} bytes a position where the settings say {packing.log_p_bytes}")
    parts, rest = Pieces(packed), packing.k - packing.exact_k
    exact = parts.floats(packing.exact_k, packing.exact_dtype)
    curve = torch.zeros(len(packed), rest)
    if packing.polynomial_terms:
        coefficients = parts.floats(len(packing.polynomial_terms), packing.term_dtype)
        curve = coefficients @ _terms(packing, rest).float().T
    start = 0
    for piece in packing.residual_bins:
        scale = parts.floats(1, piece.scale_dtype)
        numbers = unpack(
            parts.take((piece.element_bits * piece.num_elements + 7) // 8), piece.element_bits, piece.num_elements
        )
        curve[:, start : start + piece.num_elements] += _signed(torch.from_numpy(numbers), piece) * scale
        start += piece.num_elements
    values = torch.cat([exact, curve], 1)
    return values.cumsum(1) if packing.delta_encoding else values


def pack_log_p(log_p: Tensor, packing: Packing) -> np.ndarray:
    """Return the bytes [n, B] of log-probabilities [n, k], likeliest first."""
    values = log_p.double()
    if packing.delta_encoding:
        values = torch.cat([values[:, :1], values.diff(dim=1)], 1)
    pieces = [_bytes(values[:, : packing.exact_k], packing.exact_dtype)]
    left = values[:, packing.exact_k :]
    if packing.polynomial_terms:
        terms = _terms(packing, left.shape[1])
        coefficients = torch.linalg.lstsq(terms, left.T).solution.T
        pieces.append(_bytes(coefficients, packing.term_dtype))
        left = left - _rounded(coefficients, packing.term_dtype) @ terms.T
    start = 0
    for piece in packing.residual_bins:
        part = left[:, start : start + piece.num_elements]
        scale, numbers = _quantised(part, piece)
        pieces += [_bytes(scale, piece.scale_dtype), pack(numbers.numpy(), piece.element_bits)]
        start += piece.num_elements
    return np.concatenate(pieces, 1)


def older_values(exact: Tensor, coefficients: Tensor, packing: OlderPacking) -> Tensor:
    """Return the values [n, k] of the older way, likeliest first: log-probabilities, up to a constant in sets of logits."""
    ranks = torch.arange(1, packing.k - packing.exact_k + 1, dtype=torch.float64)
    powers = range(packing.polynomial_degree + 1)
    terms = [ranks ** (-i if packing.invert_polynomial else i) for i in powers]
    terms += [ranks.sqrt()] * packing.with_sqrt_term
    curve = coefficients.double() @ torch.stack(terms, 1).T
    return torch.cat([exact.double(), curve], 1).float()


class Pieces:
    """Bytes [n, B] that are taken one piece after the other."""

    def __init__(self, packed: np.ndarray):
        self.packed, self.place = packed, 0

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` bytes of each position."""
        self.place += count
        return self.packed[:, self.place - count : self.place].copy()

    def floats(self, count: int, dtype: str) -> Tensor:
        """Return the next `count` numbers of each position [n, count] in float32."""
        raw = torch.from_numpy(self.take(count * DTYPES[dtype]))
        return raw.view(getattr(torch, dtype)).float() if count else torch.zeros(len(raw), 0)


def _terms(packing: Packing, ranks: int) -> Tensor:
    """Return the terms of the curve at each rank [r, T] in float64."""
    t = (
        torch.linspace(0, 1, ranks, dtype=torch.float64)
        if packing.normalize_t
        else torch.arange(ranks, dtype=torch.float64)
    )
    return torch.stack(list(_columns(packing, t)), 1)


def _columns(packing: Packing, t: Tensor) -> Iterator[Tensor]:
    for term in packing.polynomial_terms:
        if isinstance(term, int):
            yield t**term
        else:
            yield t.sqrt() if term == "sqrt" else t.exp()


def _signed(numbers: Tensor, piece: Bin) -> Tensor:
    """Return what stored whole numbers count: from -2^(bits-1); single bits stand for -1 and 1."""
    if piece.element_bits == 1:
        return numbers.float() * 2 - 1
    return (numbers - 2 ** (piece.element_bits - 1)).float()


def _quantised(values: Tensor, piece: Bin) -> tuple[Tensor, Tensor]:
    """Return (scale [n, 1], stored whole numbers [n, m]) of a bin."""
    largest = values.abs().amax(1, keepdim=True)
    half = 1 if piece.element_bits == 1 else 2 ** (piece.element_bits - 1)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / half)
    scale = _rounded(scale, piece.scale_dtype)
    if piece.element_bits == 1:
        return scale, (values > 0).long()
    numbers = (values / scale).round().clamp(-half, half - 1)
    return scale, (numbers + half).long()


def _rounded(values: Tensor, dtype: str) -> Tensor:
    return values.to(getattr(torch, dtype)).double()


def _bytes(values: Tensor, dtype: str) -> np.ndarray:
    """Return numbers [n, m] as bytes [n, m * size]."""
    stored = values.to(getattr(torch, dtype)).contiguous()
    return stored.view(torch.uint8).numpy() if values.shape[1] else np.zeros((len(values), 0), np.uint8)
