"""Intervals by resampling whole clusters (works, passages): tokens of one are correlated, clusters are independent draws."""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from moe2dense.common.numbers import show_number

# C clusters, B resamples, G groups, k sums per cluster

_FEWEST_RESAMPLED = 8  # clusters below which resampling cannot reach the tails; a jackknife takes its place


class Estimate(float):
    """A number that is a float and has a 95% interval, `.low` to `.high` (NaN where one cluster gives none)."""

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
    """Percentile intervals over resampled clusters, widened for few of them; of fewer than eight, a jackknife's.

    The percentile level is the "expanded" one of Hesterberg (What Teachers Should Know About the Bootstrap, 2015):
    Phi(-sqrt(n/(n-1)) * t_{n-1}), which corrects the narrowness of plain percentile intervals at small n. Resamples of a few
    clusters never leave the range of these, so there the interval is the jackknife's (Tukey 1958) with Student's t. The same
    seed and number of clusters give the same resamples, so differences between students of one set are paired.
    """

    def __init__(self, clusters: int, resamples: int = 1000, seed: int = 0, level: float = 0.95):
        self.clusters, self.level = clusters, level
        generator = np.random.default_rng(seed)
        draws = generator.multinomial(clusters, np.full(clusters, 1 / max(clusters, 1)), size=resamples)
        self.weights_BC = draws.astype(np.float64)

    def estimate(self, sums_Ck: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return the statistic of all clusters and its interval; `statistic` maps totals [..., k] to numbers [...]."""
        total = sums_Ck.sum(0)
        point = float(statistic(total))
        holds_any = np.abs(sums_Ck).sum(1) > 0  # a domain has only its own clusters
        used = int(holds_any.sum())
        if used < 2 or not len(self.weights_BC):
            return Estimate(point)
        t = stats.t.ppf(0.5 - self.level / 2, used - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if used < _FEWEST_RESAMPLED:
                without = np.asarray(statistic(total - sums_Ck[holds_any]), dtype=np.float64)
                error = math.sqrt((used - 1) / used * float(np.square(without - without.mean()).sum()))
                return Estimate(point, point + float(t) * error, point - float(t) * error)
            draws = np.asarray(statistic(self.weights_BC @ sums_Ck), dtype=np.float64)
        draws = draws[np.isfinite(draws)]
        if not len(draws):
            return Estimate(point)
        tail = float(stats.norm.cdf(math.sqrt(used / (used - 1)) * t))
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Estimate(point, low, high)

    def mean(self, total_C: np.ndarray, count_C: np.ndarray) -> Estimate:
        """Return the mean per token, from each cluster's sum and count; of sums that are never negative, `low` is not either."""
        mean = self.estimate(np.stack([total_C, count_C], 1), ratio)
        if mean.low >= 0 or (total_C < 0).any() or not math.isfinite(mean.low):
            return mean
        return Estimate(mean, 0.0, mean.high)


def ratio(totals: np.ndarray) -> np.ndarray:
    """Return totals[..., 0] / totals[..., 1], NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(totals[..., 1] != 0, totals[..., 0] / totals[..., 1], np.nan)
