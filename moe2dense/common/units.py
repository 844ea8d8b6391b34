"""Read and show sizes as people write them: 7b, 500k, 2GB, 25%."""

import re

from moe2dense.errors import UserError

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTES = {
    "": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*$", re.IGNORECASE)


def _parse(text: str | int | float, scales: dict[str, int], what: str, example: str) -> int:
    """Read a number with one of the suffixes in `scales`. Raises UserError naming `what` on anything else."""
    if isinstance(text, (int, float)):
        return int(text)
    match = _NUMBER.match(text.replace("_", "").replace(",", ""))
    if match is None or match[2].lower() not in scales:
        raise UserError(f"{what} must be a number such as {example}; found {text!r}")
    return round(float(match[1]) * scales[match[2].lower()])


def parse_count(text: str | int | float, what: str = "the count") -> int:
    """Read a count: `500k` -> 500_000, `7b` -> 7_000_000_000. Raises UserError naming `what` on anything else."""
    return _parse(text, _COUNT, what, "500k, 3.2m or 7b")


def parse_bytes(text: str | int | float, what: str = "the size") -> int:
    """Read a size in bytes: `2GB` -> 2_000_000_000, `2GiB` -> 2**31. Raises UserError naming `what` on anything else."""
    return _parse(text, _BYTES, what, "300MB or 2GB")


LEAST_MEMORY = 16_000_000  # bytes; less holds no layer of anything


def parse_memory(text: str | int | float, what: str = "memory") -> int:
    """Read a memory budget in bytes. Raises UserError for one that holds nothing, such as `2` where 2GB was meant."""
    budget = parse_bytes(text, what)
    if budget < LEAST_MEMORY:
        bare = str(text).strip()
        hint = f" (did you mean {bare}GB?)" if bare.replace(".", "", 1).isdigit() else ""
        raise UserError(f"{what} must be at least {show_bytes(LEAST_MEMORY)}; found {bare!r}{hint}")
    return budget


def show_count(n: int | float) -> str:
    """Show a count: 7241732096 -> '7.24B'."""
    for scale, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.3g}{suffix}"
    return f"{n:.0f}" if float(n).is_integer() else f"{n:.3g}"


def show_bytes(n: int | float) -> str:
    """Show bytes in decimal units: 93_400_000_000 -> '93.4 GB'."""
    for scale, suffix in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= scale:
            return f"{n / scale:.3g} {suffix}"
    return f"{n:.0f} B"


def show_flops(n: int | float) -> str:
    """Show FLOPs: 16_900_000_000 -> '16.9 GFLOP'."""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= scale:
            return f"{n / scale:.3g} {prefix}FLOP"
    return f"{n:.0f} FLOP"


def show_seconds(s: float) -> str:
    """Show a time: 93784 -> '1 d 2 h'; 75 -> '1 min 15 s'."""
    s = round(s)
    parts = [(s // 86400, "d"), (s % 86400 // 3600, "h"), (s % 3600 // 60, "min"), (s % 60, "s")]
    shown = [f"{n} {unit}" for n, unit in parts if n]
    return " ".join(shown[:2]) if shown else "0 s"


def names(text: str | None) -> list[str] | None:
    """Split a list of names: 'code, drama' -> ['code', 'drama']; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
