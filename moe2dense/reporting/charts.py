"""Where things go in a line chart, in per cent of its plot area: the SVG stretches with the page, the text around it does not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe2dense.common.numbers import show_number

Point = tuple[float, float]


@dataclass
class Scale:
    """Maps values to 0..100. Logarithmic where asked for and everything is positive."""

    low: float
    high: float
    log: bool = False

    def __call__(self, x: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(x, self.low * 1e-3)) if self.log else x
        return round(min(100.0, max(0.0, 100 * (at - low) / ((high - low) or 1))), 3)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round values within the scale."""
        if not self.log:
            step = round_step((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        values: list[float] = []
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [f * 10.0**p for p in powers for f in factors if self._shows(f * 10.0**p)]
            if len(values) >= 3:
                break
        return values[:: math.ceil(len(values) / (most + 2))]

    def _shows(self, x: float) -> bool:
        return self.low <= x * 1.0001 <= self.high * 1.001


def round_step(step: float) -> float:
    """Return the next of 1, 2, 2.5, 5 x 10^n that is not below `step`."""
    if step <= 0 or not math.isfinite(step):
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * 0.999999)


def scale_of(values: Sequence[float], log: bool = False, zero: bool = True) -> Scale:
    """Return a scale that shows the values with a little room; from 0 where `zero` and not logarithmic."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return Scale(0, 1)
    low, high = min(known), max(known)
    if log and low > 0:
        return Scale(low / 1.25, high * 1.25 if high > low else low * 2, True)
    low = min(low, 0.0) if zero else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if zero and low == 0 else low - room, high + room)


@dataclass
class Series:
    """One line: points in data units, optional (x, low, high) band. `style` is a CSS class."""

    name: str
    style: str
    points: list[Point]
    band: list[tuple[float, float, float]] = field(default_factory=list)
    dots: bool = False


@dataclass
class LineChart:
    """A line chart ready for the template, and the same numbers as a table."""

    title: str
    x_label: str
    y_label: str
    series: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    table: dict[str, Any]


def line_chart(
    title: str, x_label: str, y_label: str, series: list[Series], log: bool = False, zero: bool = True
) -> LineChart | None:
    """Place the series that have points; None where none has."""
    series = [s for s in series if s.points]
    if not series:
        return None
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [v for s in series for _, a, b in s.band for v in (a, b)]
    x_scale = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y_scale = scale_of(ys, log, zero)
    return LineChart(
        title,
        x_label,
        y_label,
        [_placed(s, x_scale, y_scale) for s in series],
        [(x_scale(t), axis_number(t)) for t in x_scale.ticks(5)],
        [(100 - y_scale(t), axis_number(t)) for t in y_scale.ticks()],
        merged_table(x_label, series),
    )


def _placed(series: Series, x_scale: Scale, y_scale: Scale) -> dict[str, Any]:
    """Return one line with its band and dots, in per cent of the plot area."""
    band = [(x_scale(x), 100 - y_scale(high)) for x, _, high in series.band]
    band += [(x_scale(x), 100 - y_scale(low)) for x, low, _ in reversed(series.band)]
    points = [(x_scale(x), 100 - y_scale(y)) for x, y in series.points]
    return {
        "name": series.name,
        "style": series.style,
        "path": " ".join(f"{x:g},{y:g}" for x, y in points),
        "dots": points if series.dots or len(points) == 1 else [],
        "band": " ".join(f"{x:g},{y:g}" for x, y in band),
    }


def merged_table(x_label: str, series: list[Series], most: int = 200) -> dict[str, Any]:
    """Return {"head": [...], "rows": [[...]]} with one row per x; long series are thinned evenly, keeping the last."""
    xs = sorted({x for s in series for x, _ in s.points})
    if len(xs) > most:
        xs = sorted({xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)})
    values = [dict(s.points) for s in series]
    rows = [[axis_number(x)] + [show_number(y.get(x)) for y in values] for x in xs]
    return {"head": [x_label, *(s.name for s in series)], "rows": rows}


def axis_number(x: float) -> str:
    """Show a number at an axis: 250000 -> '250k'."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:.3g}"


def ramp_step(x: float | None, low: float, high: float, steps: int = 10) -> int | None:
    """Return which of `steps` colours a value has between low and high; None where there is no value."""
    if x is None or not math.isfinite(x):
        return None
    share = (x - low) / ((high - low) or 1)
    return min(steps - 1, max(0, int(share * steps)))
