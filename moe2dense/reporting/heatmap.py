"""The layer x expert heatmap: its drawing for the default metric, and the data the page's script switches between."""

import re
from typing import Any

from markupsafe import Markup

from moe2dense.reporting.charts import number, percent, ramp_step
from moe2dense.reporting.definitions import BY_KEY, METRICS

# L sparse layers, E experts

CONTEXT_BUDGET = 900_000  # bytes of example text a page may carry
_CONTEXT_SIZE = 130


def value_range(transfer: dict[str, Any], key: str) -> tuple[float, float]:
    """Where a metric's colours begin and end: shares of 1 span 0 to 1, others what was found (1st to 99th percentile)."""
    if key in ("coverage", "kept_energy", "kept_neurons", "replaceability"):
        return 0.0, 1.0
    found = sorted(v for row in transfer["layers"] for v in row["metrics"].get(key) or [] if v is not None)
    if not found:
        return 0.0, 1.0
    low, high = found[int(0.01 * (len(found) - 1))], found[-1 - int(0.01 * (len(found) - 1))]
    return (0.0 if BY_KEY[key].good != "high" and low < 0.5 * high else low), (high if high > low else low + 1e-9)


def heatmap_svg(transfer: dict[str, Any], key: str) -> Markup:
    """One rect per expert, classes c0..c9 by value, u where unmeasured; a stretched viewBox of E x L units."""
    rows = transfer["layers"]
    width = max((len(r["measured"]) for r in rows), default=1)
    low, high = value_range(transfer, key)
    cells = []
    for y, row in enumerate(rows):
        for x, v in enumerate(row["metrics"].get(key) or [None] * len(row["measured"])):
            step = ramp_step(v, low, high)
            style = "u" if step is None else f"c{step}"
            cells.append(f'<rect x="{x}" y="{y}" class="{style}"/>')
    label = f"{BY_KEY[key].label} of every expert, one row per layer; the same numbers are in the table below"
    return Markup(
        f'<svg id="map" viewBox="0 0 {width} {len(rows)}" preserveAspectRatio="none" role="img" aria-label="{label}" tabindex="0">'
        + "".join(cells)
        + "</svg>"
    )


def heatmap_data(transfer: dict[str, Any]) -> dict[str, Any]:
    """What the page's script needs, rounded: metrics by layer, provenances, domains, examples within a budget."""
    rows = transfer["layers"]
    experts = sum(len(r["measured"]) for r in rows)
    each = max(0, min(6, CONTEXT_BUDGET // (_CONTEXT_SIZE * max(experts, 1))))
    present = [m for m in METRICS if any(v is not None for r in rows for v in r["metrics"].get(m.key) or [])]
    return {
        "metrics": [
            {
                "key": m.key,
                "label": m.label,
                "good": m.good,
                "unit": m.unit,
                "text": m.text,
                "range": value_range(transfer, m.key),
            }
            for m in present
        ],
        "domains": transfer.get("domains") or [],
        "domainShare": _rounded(transfer.get("domain_share") or []),
        "leastTokens": transfer.get("least_tokens"),
        "layers": [_layer(r, [m.key for m in present], each) for r in rows],
    }


def _layer(row: dict[str, Any], keys: list[str], contexts: int) -> dict[str, Any]:
    provenances = sorted(set(row.get("provenance") or []))
    keep = ("index", "tokens", "blocks", "replaced_by", "neurons_from", "other_neurons")
    return {
        **{k: row.get(k) for k in keep},
        "m": {k: _rounded(row["metrics"].get(k) or []) for k in keys},
        "provenances": provenances,
        "provenance": [provenances.index(f) for f in row.get("provenance") or []],
        "domainsOf": _rounded(row.get("domains") or []),
        "chance": _rounded(row.get("lift_chance") or []),
        "between": {
            k: [_rounded(row.get(f"{name}_{end}") or []) for end in ("low", "high")]
            for k, name in (("kl_after", "kl"), ("coverage", "coverage"))
        },
        "base": {k: _rounded(row.get(f"error_{k}") or []) for k in ("zero", "mean", "random")},
        "examples": [[_cut(c) for c in cells[:contexts]] for cells in row.get("contexts") or []] if contexts else [],
    }


def _cut(cell: list[Any]) -> list[Any]:
    before, token, after, *rest = cell
    before, token, after = (re.sub(r"\s+", " ", str(x)) for x in (before, token, after))
    return [before[-44:], token[:24], after[:32], *rest]


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(v) for v in values]
    if not isinstance(values, float):
        return values
    value = float(f"{values:.3g}")
    return int(value) if value.is_integer() else value


def ranked_rows(transfer: dict[str, Any], which: str) -> list[dict[str, Any]]:
    """The `worst` or `best` experts as table rows."""
    by_index = {r["index"]: r for r in transfer["layers"]}
    names = transfer.get("domains") or []
    out = []
    for layer, e in transfer.get(which) or []:
        row = by_index[layer]
        m = {k: (row["metrics"].get(k) or [None] * (e + 1))[e] for k in BY_KEY}
        shares = (row.get("domains") or [[]] * (e + 1))[e]
        top = max(range(len(shares)), key=lambda i: shares[i]) if shares and names else None
        domain = f"{names[top] or '(no label)'} {percent(shares[top])}" if top is not None else "–"
        out.append(
            {
                "layer": layer,
                "expert": e,
                "coverage": percent(m["coverage"]),
                "share": m["coverage"],
                "provenance": (row.get("provenance") or [""] * (e + 1))[e],
                "error": f"{number(m['error_before'])} → {number(m['error_after'])}",
                "kl": number(m["kl_after"]),
                "load": percent(m["load"], 1),
                "energy": percent(m["energy_share"], 1),
                "domain": domain,
            }
        )
    return out
