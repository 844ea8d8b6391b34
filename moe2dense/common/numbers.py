"""Show measured numbers and shares, in one form everywhere: 0.106, 12,346, 47%."""

import math

UNKNOWN = "–"  # stands where there is no number


def show_number(x: float | None, digits: int = 3) -> str:
    """Show a number with about `digits` significant digits, and at most four places; a dash for None and NaN."""
    if x is None or not math.isfinite(x):
        return UNKNOWN
    if x == 0:
        return "0"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(places, 4 if digits <= 3 else 6)}f}"


def show_percent(x: float | None, digits: int = 0) -> str:
    """Show a share of 1 in per cent: 0.123 -> '12%'; a dash for None and NaN."""
    return UNKNOWN if x is None or not math.isfinite(x) else f"{100 * x:.{digits}f}%"
