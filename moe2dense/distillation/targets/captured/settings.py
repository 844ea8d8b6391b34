"""How a captured set was packed: DistillKit's compression settings, read from its own files.

A capture lies beside a `compression_config.yaml`. Where a published set has none, the settings stand in the run that it is meant
for, under `teacher`, and are given by hand.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moe2dense.errors import UserError, first_line

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes
SETTINGS_FILE = "compression_config.yaml"
_MOST_BITS = 64
_NEWER, _OLDER = "logprob_compressor", "legacy_logit_compression"
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Bin:
    """Residuals that share a scale: how many, with how many bits each, and the dtype of the scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return DTYPES[self.scale_dtype] + (self.element_bits * self.num_elements + 7) // 8


@dataclass(frozen=True)
class Packing:
    """The newer way: log-probabilities that never rise, or their steps, as exact numbers, a curve and residuals in few bits.

    d: size of the vocabulary; k: tokens of each position; exact_k: of them stored as numbers of exact_dtype; polynomial_terms: powers
    of the rank ("sqrt" and "exp" too) that fit the rest, with coefficients of term_dtype; residual_bins: what the curve leaves.
    """

    d: int
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...] = ()
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        dtypes = (self.exact_dtype, self.term_dtype, *(b.scale_dtype for b in self.residual_bins))
        if not 0 <= self.exact_k <= self.k <= self.d or self.k < 1 or any(name not in DTYPES for name in dtypes):
            raise ValueError(f"k {self.k}, exact_k {self.exact_k}, d {self.d} and {dtypes} do not fit together")
        if any(not isinstance(term, int) and term not in ("sqrt", "exp") for term in self.polynomial_terms):
            raise ValueError(f"polynomial_terms are {self.polynomial_terms}")
        if any(not 1 <= b.element_bits <= _MOST_BITS or b.num_elements < 1 for b in self.residual_bins):
            raise ValueError("residual_bins hold a size that cannot be")
        if sum(b.num_elements for b in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins hold more than k - exact_k numbers")

    @property
    def log_p_bytes(self) -> int:
        """Bytes of the log-probabilities of one position."""
        numbers = self.exact_k * DTYPES[self.exact_dtype] + len(self.polynomial_terms) * DTYPES[self.term_dtype]
        return numbers + sum(b.bytes for b in self.residual_bins)


@dataclass(frozen=True)
class OlderPacking:
    """The older way: the first exact_k values in float16, the rest a polynomial of the rank, which may be one of 1 / rank."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.exact_k <= self.k <= self.vocab_size or self.k < 1 or self.term_dtype not in DTYPES:
            raise ValueError(f"k {self.k}, exact_k {self.exact_k} and vocab_size {self.vocab_size} do not fit together")

    @property
    def d(self) -> int:
        """Size of the vocabulary."""
        return self.vocab_size


def default_packing(vocabulary: int, k: int) -> Packing:
    """Return settings that lose little: up to 24 exact in float32, of more the first 16 and the rest a curve with 8-bit residuals."""
    exact = k if k <= 24 else 16
    rest = k - exact
    bins = (Bin("float32", 8, rest),) if rest else ()
    terms: tuple[int | str, ...] = (0, 1, 2, "sqrt") if rest else ()
    return Packing(vocabulary, k, exact, bins, polynomial_terms=terms, delta_encoding=False)


def read_packing(path: str | Path) -> Packing | OlderPacking:
    """Read the settings of a capture, or those under `teacher` of one of DistillKit's run configs. Raises UserError."""
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; it should hold how the set was packed") from error
    if isinstance(table, Mapping) and isinstance(table.get("teacher"), Mapping):
        table = table["teacher"]
    try:
        if isinstance(table, Mapping) and table.get(_NEWER):
            return _packing(table[_NEWER])
        if isinstance(table, Mapping) and table.get(_OLDER):
            return _known(OlderPacking, table[_OLDER])
        return _known(OlderPacking, table) if "vocab_size" in table else _packing(table)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not say how a set was packed ({first_line(error)}); see DistillKit's README"
        ) from error


def _packing(table: Mapping[str, Any]) -> Packing:
    bins = tuple(_known(Bin, entry) for entry in table.get("residual_bins") or ())
    terms = tuple(table.get("polynomial_terms") or ())
    return _known(Packing, {**table, "residual_bins": bins, "polynomial_terms": terms})


def _known(kind: type[Kind], table: Mapping[str, Any]) -> Kind:
    """Make a dataclass of the fields that it has. Raises TypeError for a field that it lacks, which would be ignored."""
    unknown = set(table) - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise TypeError(f"unknown fields {', '.join(sorted(unknown))}")
    return kind(**table)


def write_packing(path: Path, packing: Packing) -> None:
    """Write the settings as DistillKit does."""
    table = asdict(packing)
    table["residual_bins"] = [dict(entry) for entry in table["residual_bins"]]
    table["polynomial_terms"] = list(packing.polynomial_terms) or None
    path.write_text(yaml.safe_dump(table), encoding="utf-8")
