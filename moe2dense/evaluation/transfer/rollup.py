"""From experts to layers to the model, and what the build says of each expert's provenance."""

from typing import Any

import torch

from moe2dense.student.types import MIXED, NEW, SHARED, LayerProvenance

KEPT, DROPPED = 0.9, 0.01  # share of an expert's neuron energy from which it counts as kept, below which as dropped


def provenance_columns(provenance: LayerProvenance | None, experts: int, width: int) -> dict[str, Any]:
    """Return how a layer was built: shares kept by expert, a word for each expert, and how many neurons came from where.

    `provenance` is None where it is not known. A layer that is mostly mixtures of several neurons is "merged".
    """
    if provenance is None:
        return {"metrics": {}, "provenance": [], "neurons_from": None, "other_neurons": {}}
    source, total = provenance.source_expert, provenance.energy_total.double()
    energy = torch.where(total > 0, provenance.energy_kept.double() / total.clamp(min=1e-30), torch.nan)
    routed = source >= 0  # neurons of routed experts
    pairs = torch.stack([source[routed], provenance.source_neuron[routed]], 1).unique(dim=0)
    neurons = torch.bincount(source[routed], minlength=experts)
    distinct = torch.bincount(pairs[:, 0], minlength=experts)
    merged = int((source == MIXED).sum()) * 2 > len(source)

    def word(e: int) -> str:
        energy_kept = float(energy[e])
        if merged:
            return "merged"
        if neurons[e] == 0 or energy_kept < DROPPED:
            return "dropped"
        return "kept" if energy_kept >= KEPT or int(distinct[e]) == width else "partly kept"

    others = {"shared": SHARED, "new": NEW, "mixed": MIXED}
    return {
        "metrics": {
            "kept_energy": [float(v) for v in energy],
            "kept_neurons": [int(n) / width if width else None for n in distinct],
        },
        "provenance": [word(e) for e in range(experts)],
        "neurons_from": neurons.tolist(),
        "other_neurons": {k: int((source == v).sum()) for k, v in others.items()},
    }


def layer_rollup(row: dict[str, Any]) -> dict[str, Any]:
    """Return the measured experts' coverage, cut to 0..1, weighted by their share of the layer's output energy."""
    metrics = row["metrics"]
    cells = [
        (c, s)
        for c, s in zip(metrics.get("coverage") or [], metrics["energy_share"], strict=False)
        if c is not None and s > 0
    ]
    weight = sum(s for _, s in cells)
    return {
        "coverage": sum(min(1.0, max(0.0, c)) * s for c, s in cells) / weight if weight else None,
        "measured": sum(row["measured"]),
    }


def model_rollup(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over sparse layers: "transferred" coverage, "reproduced" 1 - block error after training (and "_before").

    "experts" and "measured" count them. None where nothing was measured.
    """

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    def reproduced(key: str) -> float | None:
        errors = [r["rollup"].get(key) for r in rows]
        return mean([None if e is None else max(0.0, 1 - e) for e in errors])

    return {
        "transferred": mean([r["rollup"]["coverage"] for r in rows]),
        "reproduced": reproduced("error_after"),
        "reproduced_before": reproduced("error_before"),
        "experts": sum(len(r["measured"]) for r in rows),
        "measured": sum(sum(r["measured"]) for r in rows),
    }


def ranking(rows: list[dict[str, Any]], most: int = 8) -> tuple[list[list[int]], list[list[int]]]:
    """Return (least, best) transferred experts as [layer, expert], by functional coverage."""
    cells = [
        (v, r["index"], e) for r in rows for e, v in enumerate(r["metrics"].get("coverage") or []) if v is not None
    ]
    cells.sort()
    count = min(most, (len(cells) + 1) // 2)
    return [[i, e] for _, i, e in cells[:count]], [[i, e] for _, i, e in cells[::-1][:count]]
