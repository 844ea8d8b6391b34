"""The layer x expert heatmap: its drawing for one metric, and the data that the page's script switches between."""

import re
from typing import Any

from markupsafe import Markup

from moe2dense.common.numbers import UNKNOWN, show_number, show_percent
from moe2dense.reporting.charts import ramp_step
from moe2dense.reporting.definitions import EXPERT, EXPERT_METRICS

# L sparse layers, E experts

CONTEXT_BUDGET = 900_000  # bytes of example text a page may hold
_CONTEXT_SIZE = 130
_FROM_0_TO_1 = ("coverage", "kept_energy", "kept_neurons", "replaceability")


def value_range(transfer: dict[str, Any], key: str) -> tuple[float, float]:
    """Return where a metric's colours begin and end: shares of 1 span 0 to 1, others their 1st to 99th percentile."""
    if key in _FROM_0_TO_1:
        return 0.0, 1.0
    values = sorted(v for row in transfer["layers"] for v in row["metrics"].get(key) or [] if v is not None)
    if not values:
        return 0.0, 1.0
    margin = int(0.01 * (len(values) - 1))
    low, high = values[margin], values[-1 - margin]
    return (0.0 if EXPERT[key].good != "high" and low < 0.5 * high else low), (high if high > low else low + 1e-9)


def heatmap_svg(transfer: dict[str, Any], key: str) -> Markup:
    """Draw one rect per expert, classes c0..c9 by value, u where unmeasured, in a stretched viewBox of E x L units."""
    rows = transfer["layers"]
    width = max((len(r["measured"]) for r in rows), default=1)
    low, high = value_range(transfer, key)
    cells = []
    for y, row in enumerate(rows):
        for x, v in enumerate(row["metrics"].get(key) or [None] * len(row["measured"])):
            step = ramp_step(v, low, high)
            style = "u" if step is None else f"c{step}"
            cells.append(f'<rect x="{x}" y="{y}" class="{style}"/>')
    label = f"{EXPERT[key].title} of every expert, one row per layer; the same numbers are in the table below"
    return Markup(
        f'<svg id="map" viewBox="0 0 {width} {len(rows)}" preserveAspectRatio="none" role="img" aria-label="{label}" tabindex="0">'
        + "".join(cells)
        + "</svg>"
    )


def heatmap_data(transfer: dict[str, Any]) -> dict[str, Any]:
    """Return what the page's script needs, rounded: metrics by layer, provenance, domains, examples within a budget."""
    rows = transfer["layers"]
    experts = sum(len(r["measured"]) for r in rows)
    examples = max(0, min(6, CONTEXT_BUDGET // (_CONTEXT_SIZE * max(experts, 1))))
    shown = [m for m in EXPERT_METRICS if any(v is not None for r in rows for v in r["metrics"].get(m.key) or [])]
    return {
        "metrics": [
            {
                "key": m.key,
                "title": m.title,
                "good": m.good,
                "unit": m.unit,
                "help": m.help,
                "range": value_range(transfer, m.key),
            }
            for m in shown
        ],
        "domains": transfer.get("domains") or [],
        "domainShare": _rounded(transfer.get("domain_share") or []),
        "leastTokens": transfer.get("least_tokens"),
        "layers": [_layer(r, [m.key for m in shown], examples) for r in rows],
    }


def _layer(row: dict[str, Any], keys: list[str], examples: int) -> dict[str, Any]:
    """Return one layer's data; every provenance word once, and for each expert which of them it has."""
    words = sorted(set(row.get("provenance") or []))
    contexts = row.get("contexts") or []
    return {
        **{k: row.get(k) for k in ("index", "tokens", "blocks", "replaced_by", "neurons_from", "other_neurons")},
        "m": {k: _rounded(row["metrics"].get(k) or []) for k in keys},
        "provenances": words,
        "provenance": [words.index(word) for word in row.get("provenance") or []],
        "domainsOf": _rounded(row.get("domains") or []),
        "chance": _rounded(row.get("lift_chance") or []),
        "between": {
            k: [_rounded(row.get(f"{name}_{end}") or []) for end in ("low", "high")]
            for k, name in (("kl_after", "kl"), ("coverage", "coverage"))
        },
        "base": {k: _rounded(row.get(f"error_{k}") or []) for k in ("zero", "mean", "random")},
        "examples": [[_shortened(c) for c in cells[:examples]] for cells in contexts] if examples else [],
    }


def _shortened(context: list[Any]) -> list[Any]:
    before, token, after, *rest = context
    before, token, after = (re.sub(r"\s+", " ", str(x)) for x in (before, token, after))
    return [before[-44:], token[:24], after[:32], *rest]


def _rounded(values: Any) -> Any:
    """Return the values, lists of lists included, with three significant digits."""
    if isinstance(values, list):
        return [_rounded(v) for v in values]
    if not isinstance(values, float):
        return values
    value = float(f"{values:.3g}")
    return int(value) if value.is_integer() else value


def ranked_rows(transfer: dict[str, Any], which: str) -> list[dict[str, Any]]:
    """Return the `worst` or `best` experts as table rows."""
    by_index = {r["index"]: r for r in transfer["layers"]}
    domains = transfer.get("domains") or []
    shown = []
    for layer, e in transfer.get(which) or []:
        row = by_index[layer]
        values = {k: (row["metrics"].get(k) or [None] * (e + 1))[e] for k in EXPERT}
        shares = (row.get("domains") or [[]] * (e + 1))[e]
        top = max(range(len(shares)), key=lambda i: shares[i]) if shares and domains else None
        shown.append(
            {
                "layer": layer,
                "expert": e,
                "coverage": show_percent(values["coverage"]),
                "share": values["coverage"],
                "provenance": (row.get("provenance") or [""] * (e + 1))[e] or UNKNOWN,
                "error": f"{show_number(values['error_before'])} → {show_number(values['error_after'])}",
                "kl": show_number(values["kl_after"]),
                "load": show_percent(values["load"], 1),
                "energy": show_percent(values["energy_share"], 1),
                "domain": UNKNOWN if top is None else f"{domains[top] or '(no label)'} {show_percent(shares[top])}",
            }
        )
    return shown
