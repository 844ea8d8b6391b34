"""Report what a teacher's router does on a text: load, imbalance, dead experts, and what that says about making it dense."""

from typing import Any

import torch
from torch import Tensor

from moe2dense.common.processes import my_share
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.routing import LayerStats, RoutingStats, reduce_stats


def gini(load: Tensor) -> float:
    """Return the Gini coefficient of nonnegative loads [E]: 0 = all alike, (E - 1) / E = one takes all."""
    value = load.double().sort().values
    n, total = len(value), value.sum()
    if total == 0:
        return 0.0
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    return float((2 * (rank * value).sum() / (n * total)) - (n + 1) / n)


def effective_experts(load: Tensor) -> float:
    """Return exp(entropy) of the shares of the load [E]: E when even, 1 when one expert takes all."""
    p = load.double() / load.double().sum().clamp(min=1e-300)
    return float(torch.exp(-(p * torch.where(p > 0, p, 1.0).log()).sum()))


def _layer(index: int, stats: LayerStats, top_k: int) -> dict[str, Any]:
    """Return the report's row of one sparse layer."""
    alpha = stats.alpha.sort(descending=True).values
    covered = (alpha.cumsum(0) / alpha.sum().clamp(min=1e-300)).clamp(max=1.0)
    return {
        "layer": index,
        "sparse": True,
        "load": stats.load.tolist(),
        "mean_weight": stats.mean_weight.tolist(),
        "gini": gini(stats.load),
        "effective_experts": effective_experts(stats.load),
        "dead": (stats.count == 0).nonzero()[:, 0].tolist(),
        "coverage_top_k": float(covered[top_k - 1]),
        "experts_for_90": int((covered < 0.9).sum()) + 1,
    }


def routing_report(teacher: Teacher, blocks: Blocks) -> dict[str, Any]:
    """Measure routing statistics of every layer on `blocks`, in numbers that JSON can hold. Raises UserError for a dense model.

    coverage_top_k: share of the routing weight that the K busiest experts of the layer carry; experts_for_90: how many carry 90%.
    Under torch.distributed each process streams its share, and every one gets the whole report.
    """
    if teacher.card is None:
        raise UserError(f"{teacher.path} is a dense model and has no routing to inspect")
    stats = RoutingStats(outputs=False)
    share = my_share(len(blocks))
    part = [None if t is None else t[share] for t in (blocks.attention_mask, blocks.document_ids)]
    if share.stop > share.start:
        teacher.run(blocks.input_ids[share], *part, observers=[stats], logits=False)
    reduce_stats(stats)
    layers, experts, top_k = [], 0, 0
    for i in range(len(teacher.body.layers)):
        if i not in stats.layers:
            layers.append({"layer": i, "sparse": False})
            continue
        s = stats[i]
        experts, top_k = len(s.count), round(float(s.load.sum()))
        layers.append(_layer(i, s, top_k))
    sparse = [row for row in layers if row["sparse"]]
    tokens = int(stats.layers[sparse[0]["layer"]].tokens)
    return {
        "path": str(teacher.path), "family": teacher.card.title, "tokens": tokens, "num_experts": experts,
        "top_k": top_k, "layers": layers, "dead_experts": sum(len(row["dead"]) for row in sparse),
        "prediction": prediction(sparse, experts, top_k, tokens),
    }  # fmt: skip


def prediction(sparse: list[dict[str, Any]], experts: int, top_k: int, tokens: int) -> str:
    """Return one line on how much of the model its busiest experts carry on this text."""
    mean = lambda key: sum(row[key] for row in sparse) / len(sparse)  # noqa: E731
    effective, coverage, for_90 = mean("effective_experts"), mean("coverage_top_k"), mean("experts_for_90")
    even = effective / experts
    if even < 0.5:
        verdict = "routing is concentrated, so keeping the busiest experts whole should keep most of the model"
    elif even < 0.85:
        verdict = "routing is uneven, so selecting neurons across experts should beat keeping experts whole"
    else:
        verdict = (
            "routing is even, so no few experts stand for the rest and neurons must be selected and refitted across all"
        )
    caution = f"; {tokens} tokens are few for {experts} experts" if tokens * top_k < 100 * experts else ""
    return (
        f"{effective:.1f} of {experts} experts in effective use, the {top_k} busiest of a layer carry {coverage:.0%} of the routing "
        f"weight and {for_90:.1f} carry 90%: {verdict}{caution}"
    )
