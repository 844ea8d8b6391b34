"""Intervals by resampling whole blocks: tokens of one block are correlated, blocks are the independent draws."""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from moe2dense.common.numbers import show_number

# N blocks, B resamples, G groups, k sums per block


class Estimate(float):
    """A number that is a float and has a 95% interval, `.low` to `.high` (NaN where one block gives none)."""

    low: float
    high: float

    def __new__(cls, value: float, low: float = math.nan, high: float = math.nan) -> "Estimate":
        self = super().__new__(cls, value)
        self.low, self.high = float(low), float(high)
        return self

    def to_dict(self) -> dict[str, float | None]:
        """Return {"value", "low", "high"} with None for what is not a number, as JSON needs it."""
        return {"value": finite(self), "low": finite(self.low), "high": finite(self.high)}

    def __repr__(self) -> str:
        if not math.isfinite(self.low):
            return f"{show_number(self)} (no interval)"
        return f"{show_number(self)} (95% interval {show_number(self.low)} to {show_number(self.high)})"


def finite(x: float) -> float | None:
    """Return the number, or None where it is NaN or infinite (JSON has neither)."""
    return float(x) if math.isfinite(x) else None


class Bootstrap:
    """Percentile intervals over resampled blocks, widened for few blocks.

    The percentile level is the "expanded" one of Hesterberg (What Teachers Should Know About the Bootstrap, 2015):
    Phi(-sqrt(n/(n-1)) * t_{n-1}), which corrects the narrowness of plain percentile intervals at small n. The same
    seed and number of blocks give the same resamples, so differences between students of one set are paired.
    """

    def __init__(self, blocks: int, resamples: int = 1000, seed: int = 0, level: float = 0.95):
        self.blocks, self.level = blocks, level
        draws = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / max(blocks, 1)), size=resamples)
        self.weights_BN = draws.astype(np.float64)

    def estimate(self, sums_Nk: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return the statistic of all blocks and its interval; `statistic` maps totals [..., k] to numbers [...]."""
        point = float(statistic(sums_Nk.sum(0)))
        used = int((np.abs(sums_Nk).sum(1) > 0).sum())  # blocks that hold any of it (a domain has only its own)
        if used < 2 or not len(self.weights_BN):
            return Estimate(point)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = np.asarray(statistic(self.weights_BN @ sums_Nk), dtype=np.float64)
        draws = draws[np.isfinite(draws)]
        if not len(draws):
            return Estimate(point)
        t = stats.t.ppf(0.5 - self.level / 2, used - 1)
        tail = float(stats.norm.cdf(math.sqrt(used / (used - 1)) * t))
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Estimate(point, low, high)

    def mean(self, total_N: np.ndarray, count_N: np.ndarray) -> Estimate:
        """Return the mean per token, from each block's sum and count."""
        return self.estimate(np.stack([total_N, count_N], 1), ratio)


def ratio(totals: np.ndarray) -> np.ndarray:
    """Return totals[..., 0] / totals[..., 1], NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(totals[..., 1] != 0, totals[..., 0] / totals[..., 1], np.nan)
