"""Where things go in a chart, in per cent of its plot area: the SVG stretches with the page, the text beside it does not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Point = tuple[float, float]


@dataclass
class Scale:
    """Values to 0..100. Logarithmic where asked and everything is positive."""

    low: float
    high: float
    log: bool = False

    def __call__(self, x: float) -> float:
        a, b = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        v = math.log(max(x, self.low * 1e-3)) if self.log else x
        return round(min(100.0, max(0.0, 100 * (v - a) / ((b - a) or 1))), 3)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within the scale."""
        if not self.log:
            step = nice((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [
                f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p * 1.0001 <= self.high * 1.001
            ]
            if len(found) >= 3:
                break
        return found[:: math.ceil(len(found) / (most + 2))]


def nice(step: float) -> float:
    """The next of 1, 2, 2.5, 5 x 10^n that is not below `step`."""
    if step <= 0 or not math.isfinite(step):
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * 0.999999)


def scale_of(values: Sequence[float], log: bool = False, zero: bool = True) -> Scale:
    """A scale that holds the values with a little air; from 0 where `zero` and not logarithmic."""
    found = [v for v in values if v is not None and math.isfinite(v)]
    if not found:
        return Scale(0, 1)
    low, high = min(found), max(found)
    if log and low > 0:
        return Scale(low / 1.25, high * 1.25 if high > low else low * 2, True)
    low = min(low, 0.0) if zero else low
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if zero and low == 0 else low - air, high + air)


@dataclass
class Series:
    """One line: points in data units, optional (x, low, high) band. `style` is a CSS class."""

    name: str
    style: str
    points: list[Point]
    band: list[tuple[float, float, float]] = field(default_factory=list)
    dots: bool = False


@dataclass
class Lines:
    """A line chart ready for the template."""

    title: str
    x_label: str
    y_label: str
    series: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    table: dict[str, Any]


def lines(
    title: str, x_label: str, y_label: str, series: list[Series], log: bool = False, zero: bool = True
) -> Lines | None:
    """A line chart of the series that have points; None where none has."""
    series = [s for s in series if s.points]
    if not series:
        return None
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [v for s in series for _, a, b in s.band for v in (a, b)]
    x_scale = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y_scale = scale_of(ys, log, zero)
    drawn = []
    for s in series:
        band = [(x_scale(x), 100 - y_scale(b)) for x, _, b in s.band]
        band += [(x_scale(x), 100 - y_scale(a)) for x, a, _ in reversed(s.band)]
        placed = [(x_scale(x), 100 - y_scale(y)) for x, y in s.points]
        drawn.append(
            {
                "name": s.name,
                "style": s.style,
                "path": " ".join(f"{x:g},{y:g}" for x, y in placed),
                "dots": placed if s.dots or len(placed) == 1 else [],
                "band": " ".join(f"{x:g},{y:g}" for x, y in band),
            }
        )
    return Lines(
        title,
        x_label,
        y_label,
        drawn,
        [(x_scale(t), short(t)) for t in x_scale.ticks(5)],
        [(100 - y_scale(t), short(t)) for t in y_scale.ticks()],
        merged_table(x_label, series),
    )


def merged_table(x_label: str, series: list[Series], most: int = 200) -> dict[str, Any]:
    """{"head": [...], "rows": [[...]]} with one row per x; long series are thinned evenly, keeping the last."""
    xs = sorted({x for s in series for x, _ in s.points})
    if len(xs) > most:
        xs = sorted({xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)})
    maps = [dict(s.points) for s in series]
    rows = [[short(x)] + [number(m.get(x)) for m in maps] for x in xs]
    return {"head": [x_label, *(s.name for s in series)], "rows": rows}


def number(x: float | None, digits: int = 3) -> str:
    """A number as people read it, or a dash."""
    if x is None or not math.isfinite(x):
        return "–"
    if x == 0:
        return "0"
    if abs(x) >= 1000:
        return f"{x:,.0f}".replace(",", " ")
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(places, 4 if digits <= 3 else 6)}f}"


def percent(x: float | None, digits: int = 0) -> str:
    """0.123 -> '12 %', with a space that does not break."""
    return "–" if x is None or not math.isfinite(x) else f"{100 * x:.{digits}f}\u00a0%"


def short(x: float) -> str:
    """An axis label: 250000 -> '250k'."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:.3g}"


def ramp_step(x: float | None, low: float, high: float, steps: int = 10) -> int | None:
    """Which of `steps` colours a value has between low and high; None where there is no value."""
    if x is None or not math.isfinite(x):
        return None
    share = (x - low) / ((high - low) or 1)
    return min(steps - 1, max(0, int(share * steps)))
