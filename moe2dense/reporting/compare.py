"""Two reports compared: what changed in the settings, in quality and in what survived of the experts."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moe2dense.common.numbers import UNKNOWN, show_number, show_percent
from moe2dense.errors import UserError
from moe2dense.reporting.definitions import MODEL, SCORE_KEYS
from moe2dense.reporting.report_file import Report, score_value, transfer_totals


def compare_reports(a: Report, b: Report) -> dict[str, Any]:
    """Compare the students of two reports, as plain values.

    {"settings": {key: [a, b]}, "quality": {name: {"a", "b", "difference", "separate"}}, "by_domain": {domain: [a, b]},
    "transferred": [a, b] | None, "experts": [{"layer", "expert", "a", "b", "difference"}] by how much coverage changed,
    "same_text": bool}. separate: the two 95% intervals do not overlap (a cautious sign of a difference, and only where
    both judged the same text). Raises UserError where the reports are of different teachers.
    """
    keys = ("name", "num_experts", "num_hidden_layers")
    teachers = [tuple(r["teacher"].get(k) for k in keys) for r in (a, b)]
    if teachers[0][1:] != teachers[1][1:]:
        raise UserError(
            f"the reports are of different teachers: {teachers[0]} and {teachers[1]}; compare runs of one teacher"
        )
    rows = a["rows"]["student"], b["rows"]["student"]
    domains = [{d: r["kl"]["value"] for d, r in (row.get("by_domain") or {}).items()} for row in rows]
    transferred = [transfer_totals(r).get("transferred") for r in (a, b)]
    return {
        "settings": _settings(a, b),
        "quality": {k: _pair(rows[0].get(k) or {}, rows[1].get(k) or {}) for k in SCORE_KEYS},
        "by_domain": {d: [x.get(d) for x in domains] for d in sorted({*domains[0], *domains[1]})},
        "transferred": transferred if None not in transferred else None,
        "experts": _experts(a, b),
        "same_text": all(rows[0].get(k) == rows[1].get(k) for k in ("tokens", "blocks"))
        and score_value(rows[0], "teacher_nll") == score_value(rows[1], "teacher_nll"),
    }


def _pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    x, y = a.get("value"), b.get("value")
    known = all(e.get(k) is not None for e in (a, b) for k in ("low", "high"))
    return {
        "a": x,
        "b": y,
        "difference": None if x is None or y is None else y - x,
        "separate": known and (a["high"] < b["low"] or b["high"] < a["low"]),
    }


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'train.lr': 0.001} of nested tables."""
    flat = {}
    for k, v in table.items():
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return flat


def _settings(a: Report, b: Report) -> dict[str, list[Any]]:
    x, y = (_flat(r["run"].get("config") or {}) for r in (a, b))
    return {k: [x.get(k), y.get(k)] for k in sorted({*x, *y}) if x.get(k) != y.get(k) and k != "out"}


def _coverage(report: Report) -> dict[tuple[int, int], float]:
    layers = (report.get("transfer") or {}).get("layers") or []
    cells = ((r["index"], e, v) for r in layers for e, v in enumerate(r["metrics"].get("coverage") or []))
    return {(layer, e): v for layer, e, v in cells if v is not None}


def _experts(a: Report, b: Report) -> list[dict[str, Any]]:
    x, y = _coverage(a), _coverage(b)
    rows = [
        {"layer": k[0], "expert": k[1], "a": x[k], "b": y[k], "difference": y[k] - x[k]} for k in x.keys() & y.keys()
    ]
    return sorted(rows, key=lambda r: (-abs(r["difference"]), r["layer"], r["expert"]))


def print_comparison(
    comparison: dict[str, Any], console: Console | None = None, names: tuple[str, str] = ("A", "B")
) -> None:
    """Print the result of `compare_reports` as tables on a rich console; * marks intervals that do not overlap."""
    console = console or Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(("", *names, "difference")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for key, row in comparison["quality"].items():
        table.add_row(MODEL[key].title, _show(key, row["a"]), _show(key, row["b"]), _difference(key, row))
    for domain, (x, y) in comparison["by_domain"].items():
        table.add_row(f"KL, {domain or '(no label)'}", show_number(x), show_number(y), _signed("kl", x, y))
    if comparison["transferred"]:
        x, y = comparison["transferred"]
        table.add_row(MODEL["transferred"].title, show_percent(x), show_percent(y), _signed("transferred", x, y))
    console.print(table)
    if any(row["separate"] for row in comparison["quality"].values()):
        console.print("* the two 95% intervals do not overlap", style="dim", highlight=False)
    if not comparison["same_text"]:
        console.print("[yellow]The two were judged on different text, so the differences mix both.[/]")
    for key, (x, y) in comparison["settings"].items():
        console.print(f"{key}: {x!r} → {y!r}", highlight=False, markup=False)
    for r in comparison["experts"][:5]:
        if abs(r["difference"]) >= 0.005:
            change = f"coverage {show_percent(r['a'])} → {show_percent(r['b'])}"
            console.print(f"layer {r['layer']} expert {r['expert']}: {change}", highlight=False)


def _show(key: str, x: float | None) -> str:
    return show_percent(x, 1) if MODEL[key].unit == "%" else show_number(x)


def _signed(key: str, x: float | None, y: float | None) -> str:
    """Return the difference with its sign, in percentage points for shares."""
    if x is None or y is None:
        return UNKNOWN
    return f"{100 * (y - x):+.3g} pp" if MODEL[key].unit == "%" else f"{y - x:+.3g}"


def _difference(key: str, row: dict[str, Any]) -> str:
    text = _signed(key, row["a"], row["b"])
    if not row["separate"]:
        return text
    good = MODEL[key].good
    better = abs(row["b"]) < abs(row["a"]) if good == "zero" else (row["difference"] < 0) == (good == "low")
    return f"[{'green' if better else 'red'}]{text}[/] *"
