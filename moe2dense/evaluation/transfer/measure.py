"""What each expert knew and how much of it survived: one streamed pass of the teacher, compared with the student.

moe2dense/reporting/definitions.py defines every number; each is computed in a module of its own here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.common.jsonable import clean
from moe2dense.common.progress import Report
from moe2dense.data.blocks import Blocks
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.transfer.block_errors import block_errors, stream_drift
from moe2dense.evaluation.transfer.domain_lift import domain_lift
from moe2dense.evaluation.transfer.expert_function import expert_function
from moe2dense.evaluation.transfer.expert_kl import expert_kl
from moe2dense.evaluation.transfer.observer import LayerWatch, TransferObserver
from moe2dense.evaluation.transfer.rollup import layer_rollup, model_rollup, provenance_columns, ranking
from moe2dense.evaluation.transfer.setup import TransferOptions, TransferSetup, prepare_setup, real_tokens
from moe2dense.student.types import Student
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.model import Teacher

# T tokens, N blocks, E experts

CHUNK = 4096  # tokens that a shared expert sees at once
SAMPLE = 900  # tokens of an expert for its coverage, at most
PROBE_TOKENS = 8192  # per layer, of which every expert gets a share
NEEDS_TOKENS = (  # numbers that are left out for an expert with too few tokens
    "coverage", "error_after", "error_before", "cosine_after", "cosine_before", "kl_after", "kl_before", "replaceability", "lift",
)  # fmt: skip


@dataclass
class Transfer:
    """Per layer and expert numbers, `to_dict()` as report.json has them."""

    layers: list[dict[str, Any]]
    domains: list[str]
    domain_share: list[float]
    least_tokens: int
    tokens: int
    model: dict[str, Any]
    worst: list[list[int]]
    best: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return clean(self.__dict__)


@torch.no_grad()
def measure_transfer(
    teacher: Teacher,
    blocks: Blocks,
    student: Student,
    before: Student | None = None,
    scores: Scores | None = None,
    before_scores: Scores | None = None,
    *,
    least_tokens: int = 64,
    sample: int = SAMPLE,
    bootstrap: int = 200,
    replaceability: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> Transfer:
    """Measure every expert of `teacher` against the trained `student` on held-out `blocks`.

    before: the student as it was built, of the same card, for the numbers before training. scores, before_scores: their
    `evaluate` results on the same blocks, for the token KL. least_tokens: an expert with fewer real tokens is unmeasured.
    sample: tokens per expert for coverage. tokenizer: shows each expert's strongest tokens.
    Reads the teacher's experts twice (once with replaceability=False and a student whose neurons cannot be watched).
    Raises UserError where student and teacher differ in depth or hidden size, or scores are of other blocks.
    """
    students = {name: s for name, s in (("after", student), ("before", before)) if s is not None}
    score_rows = {name: s for name, s in (("after", scores), ("before", before_scores)) if s is not None}
    options = TransferOptions(least_tokens, sample, bootstrap, replaceability, seed)
    setup = prepare_setup(teacher, blocks, students, score_rows, options)
    probes = max(8, min(64, PROBE_TOKENS // max(1, _most_experts(teacher)))) if replaceability else 0
    observer = TransferObserver(seed=seed, probes=probes, input_scaled=setup.input_scaled)
    stream = teacher.stream(
        blocks.input_ids, blocks.attention_mask, blocks.document_ids, observers=[observer], keep_experts=True
    )
    rows: list[dict[str, Any]] = []
    total = len(teacher.body.layers)
    for layer in stream:
        if layer.sparse:
            with setup.layers_on(layer.index, teacher.device):
                rows.append(_measure_layer(layer, observer.pop(layer.index), setup, tokenizer))
        if progress:
            progress("transfer", layer.index + 1, total)
    real = real_tokens(blocks)
    domains = sorted(set(blocks.domains))
    counts = np.array([float(real[[d == x for d in blocks.domains]].sum()) for x in domains])
    worst, best = ranking(rows)
    return Transfer(
        layers=rows,
        domains=domains,
        domain_share=(counts / max(counts.sum(), 1)).tolist(),
        least_tokens=least_tokens,
        tokens=int(real.sum()),
        model=model_rollup(rows),
        worst=worst,
        best=best,
    )


def _most_experts(teacher: Teacher) -> int:
    experts = (teacher.layer(i).experts for i in range(len(teacher.body.layers)))
    return max((len(e) for e in experts if e is not None), default=1)


def _measure_layer(
    layer: LayerPass, watch: LayerWatch, setup: TransferSetup, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Return one sparse layer of the report: per expert under "metrics", other columns beside it, totals under "rollup"."""
    assert layer.experts is not None and layer.top_k_index is not None
    experts, n = len(layer.experts), len(setup.blocks)
    real = layer.token_mask.cpu()
    chosen = torch.zeros(len(real), experts).scatter_(1, layer.top_k_index.cpu(), 1.0) * real[:, None]  # [T, E]
    by_block = chosen.view(n, -1, experts).sum(1)
    count = chosen.sum(0)
    measured = (count >= setup.options.least_tokens).tolist()
    errors = block_errors(layer, setup, chosen)
    kl_metrics, kl_columns = expert_kl(setup, chosen)
    function_metrics, function_columns = expert_function(layer, watch, setup, chosen, measured)
    units = setup.cluster.view(n, -1).mode(1).values.numpy()
    lift = domain_lift(by_block.double().numpy(), list(setup.blocks.domains), seed=setup.options.seed, units_N=units)
    provenance = setup.provenances[layer.index] if layer.index < len(setup.provenances) else None
    origin = provenance_columns(provenance, experts, watch.width)
    metrics = {
        "load": (count / real.sum()).tolist(),
        "mean_weight": (watch.weight / count.clamp(min=1)).tolist(),
        "alpha": (watch.weight / real.sum()).tolist(),
        "energy_share": (watch.energy / (watch.energy.sum() + _shared_energy(layer, real)).clamp(min=1e-30)).tolist(),
        **errors.metrics,
        **kl_metrics,
        **function_metrics,
        "lift": lift["lift_E"].tolist(),
        **origin.pop("metrics"),
    }
    for key in NEEDS_TOKENS:
        if key in metrics:
            metrics[key] = [v if enough else None for v, enough in zip(metrics[key], measured, strict=True)]
    row: dict[str, Any] = {
        "index": layer.index,
        "tokens": count.long().tolist(),
        "measured": measured,
        "blocks": (by_block > 0).sum(0).tolist(),
        **kl_columns,
        **function_columns,
        "domains": lift["share_ED"].round(4).tolist(),
        "lift_chance": lift["chance_E"].tolist(),
        **origin,
        "metrics": metrics,
        **errors.baselines,
    }
    drift = {f"stream_{k}": stream_drift(layer, s[layer.index], setup) for k, s in setup.streams.items()}
    row["rollup"] = layer_rollup(row) | errors.overall | drift
    row["contexts"] = watch.contexts(setup.blocks, tokenizer)
    return clean(row)


def _shared_energy(layer: LayerPass, real: Tensor) -> Tensor:
    """Return the squared size of what the layer's shared experts put out."""
    x = layer.x[real.to(layer.x.device)]
    chunks = range(0, len(x), CHUNK) if layer.shared else ()
    parts = [
        part(x[i : i + CHUNK].to(part.weights.device)).double().square().sum().cpu()
        for part in layer.shared
        for i in chunks
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
