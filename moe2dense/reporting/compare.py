"""Two reports side by side: what changed in the settings, in quality and in what survived of the experts."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moe2dense.errors import UserError
from moe2dense.reporting.assemble import Report
from moe2dense.reporting.charts import number

QUALITY = ("kl", "rare_kl", "nll", "perplexity", "agreement", "top5", "correlation", "ece", "entropy_gap")
LOWER_IS_BETTER = {"kl", "rare_kl", "nll", "perplexity", "ece"}


def compare(a: Report, b: Report) -> dict[str, Any]:
    """The students of two reports, as plain values.

    {"settings": {key: [a, b]}, "quality": {name: {"a", "b", "difference", "apart"}}, "by_domain": {domain: [a, b]},
    "transferred": [a, b] | None, "experts": [{"layer", "expert", "a", "b", "difference"}] by how much coverage changed,
    "same_text": bool}. apart: the two 95 % intervals do not overlap (a cautious sign of a difference, and only where
    both judged the same text). Raises UserError where the reports are of different teachers.
    """
    names = [
        (r["teacher"].get("name"), r["teacher"].get("num_experts"), r["teacher"].get("num_hidden_layers"))
        for r in (a, b)
    ]
    if names[0][1:] != names[1][1:]:
        raise UserError(
            f"the reports are of different teachers: {names[0]} and {names[1]}; compare runs of one teacher"
        )
    rows = a["rows"]["student"], b["rows"]["student"]
    domains = [{d: r["kl"]["value"] for d, r in (row.get("by_domain") or {}).items()} for row in rows]
    moved = [((r.get("transfer") or {}).get("model") or {}).get("transferred") for r in (a, b)]
    return {
        "settings": _settings(a, b),
        "quality": {k: _pair(rows[0].get(k) or {}, rows[1].get(k) or {}) for k in QUALITY},
        "by_domain": {d: [x.get(d) for x in domains] for d in sorted({*domains[0], *domains[1]})},
        "transferred": moved if None not in moved else None,
        "experts": _experts(a, b),
        "same_text": all(rows[0].get(k) == rows[1].get(k) for k in ("tokens", "blocks"))
        and (rows[0].get("teacher_nll") or {}).get("value") == (rows[1].get("teacher_nll") or {}).get("value"),
    }


def _pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    x, y = a.get("value"), b.get("value")
    known = all(e.get(k) is not None for e in (a, b) for k in ("low", "high"))
    return {
        "a": x,
        "b": y,
        "difference": None if x is None or y is None else y - x,
        "apart": known and (a["high"] < b["low"] or b["high"] < a["low"]),
    }


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for k, v in table.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


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
    found: dict[str, Any], console: Console | None = None, names: tuple[str, str] = ("A", "B")
) -> None:
    """What `compare` found, as tables on a rich console; * marks intervals that do not overlap."""
    console = console or Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(("", *names, "difference")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for key, row in found["quality"].items():
        table.add_row(key, number(row["a"]), number(row["b"]), _difference(key, row))
    for domain, (x, y) in found["by_domain"].items():
        table.add_row(f"kl, {domain or '(no label)'}", number(x), number(y), _signed(x, y))
    if found["transferred"]:
        table.add_row(
            "experts' function that survives",
            *(number(v) for v in found["transferred"]),
            _signed(*found["transferred"]),
        )
    console.print(table)
    if not found["same_text"]:
        console.print("[yellow]The two were judged on different text, so the differences mix both.[/]")
    for key, (x, y) in found["settings"].items():
        console.print(f"{key}: {x!r} → {y!r}", highlight=False, markup=False)
    for r in found["experts"][:5]:
        if abs(r["difference"]) >= 0.005:
            console.print(
                f"layer {r['layer']} expert {r['expert']}: coverage {r['a']:.0%} → {r['b']:.0%}", highlight=False
            )


def _signed(x: float | None, y: float | None) -> str:
    return "–" if x is None or y is None else f"{y - x:+.3g}"


def _difference(key: str, row: dict[str, Any]) -> str:
    text = _signed(row["a"], row["b"])
    if not row["apart"]:
        return text
    better = (
        (row["difference"] < 0) == (key in LOWER_IS_BETTER) if key != "entropy_gap" else abs(row["b"]) < abs(row["a"])
    )
    return f"[{'green' if better else 'red'}]{text}[/] *"
