"""What each expert knew and how much of it survived: one streamed pass of the teacher with the student beside it.

Definitions of every number are in reporting/definitions.py; their pieces are in coverage.py and beside.py.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2dense.common.jsonable import clean
from moe2dense.errors import UserError
from moe2dense.evaluation.bootstrap import Bootstrap, Estimate
from moe2dense.evaluation.scores import Scores
from moe2dense.evaluation.transfer import coverage as cov
from moe2dense.evaluation.transfer.observer import LayerWatch, TransferObserver
from moe2dense.evaluation.transfer.rollup import layer_rollup, model_rollup, provenance_columns, ranking
from moe2dense.evaluation.transfer.student_side import StudentLayer, ffn_input, residual_streams
from moe2dense.modeling.decoder import decoder_layers
from moe2dense.teacher.experts import ExpertWeights

# T tokens, N blocks, E experts, K top_k, H hidden, F expert width, M student FFN width

PIECE = 4096  # tokens that a student's FFN sees at once


@dataclass
class Transfer:
    """Per layer and expert numbers, `to_dict()` as report.json holds them."""

    layers: list[dict[str, Any]]
    domains: list[str]
    domain_share: list[float]
    least_tokens: int
    tokens: int
    model: dict[str, Any]
    worst: list[list[int]]
    best: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return clean(self.__dict__)


@dataclass
class _Setup:
    """What every layer needs."""

    blocks: Any
    card: Any
    students: dict[str, Any]  # "after", "before" -> transformers model
    provenances: list[Any]
    kl: dict[str, Tensor]  # "after", "before" -> [T] KL at every token, NaN where not judged
    bootstrap: Bootstrap
    least_tokens: int
    sample: int
    replaceability: bool
    seed: int
    follow: Tensor  # positions of every block at which the residual stream is compared
    generator: torch.Generator
    input_scaled: bool = False
    streams: dict[str, list[Tensor]] = field(default_factory=dict)


@torch.no_grad()
def measure_transfer(
    teacher: Any,
    blocks: Any,
    student: Any,
    before: Any = None,
    scores: Scores | None = None,
    before_scores: Scores | None = None,
    *,
    least_tokens: int = 64,
    sample: int = 900,
    bootstrap: int = 200,
    replaceability: bool = True,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Any = None,
) -> Transfer:
    """Measure every expert of `teacher` against the trained `student` on held-out `blocks`.

    student, before: Student objects of the same card (`before`: as it was built, for the numbers before training).
    scores, before_scores: their `evaluate` results on the same blocks, for the token KL. least_tokens: an expert with fewer
    real tokens is unmeasured. sample: tokens per expert for coverage. tokenizer: shows each expert's strongest tokens.
    Reads the teacher's experts twice (once with replaceability=False and a student whose neurons cannot be watched).
    Raises UserError where student and teacher differ in depth or hidden size, or scores are of other blocks.
    """
    setup = _prepare(teacher, blocks, student, before, scores, before_scores, least_tokens, sample, bootstrap, seed)
    setup.replaceability = replaceability
    watch = TransferObserver(
        seed=seed, probes=max(8, min(64, 8192 // max(1, _experts(teacher)))) if replaceability else 0
    )
    stream = teacher.stream(blocks.input_ids, blocks.attention_mask, blocks.document_ids, observers=[watch])
    rows: list[dict[str, Any]] = []
    total = len(teacher.body.layers)
    for layer in stream:
        if layer.sparse:
            rows.append(_measure_layer(layer, watch.pop(layer.index), setup, tokenizer))
        if progress:
            progress("transfer", layer.index + 1, total)
    domains = sorted(set(blocks.domains))
    counts = np.array([float(_real(blocks)[[d == x for d in blocks.domains]].sum()) for x in domains])
    worst, best = ranking(rows)
    return Transfer(
        layers=rows,
        domains=domains,
        domain_share=(counts / max(counts.sum(), 1)).tolist(),
        least_tokens=least_tokens,
        tokens=int(_real(blocks).sum()),
        model=model_rollup(rows),
        worst=worst,
        best=best,
    )


def _experts(teacher: Any) -> int:
    return max(
        (len(x) for i in range(len(teacher.body.layers)) if (x := teacher.layer(i).experts) is not None), default=1
    )


def _real(blocks: Any) -> Tensor:
    mask = blocks.attention_mask
    return torch.ones_like(blocks.input_ids, dtype=torch.bool) if mask is None else mask.bool()


def _prepare(
    teacher: Any, blocks: Any, student: Any, before: Any, scores: Any, before_scores: Any, least: int, sample: int, resamples: int,
    seed: int,
) -> _Setup:  # fmt: skip
    students = {"after": student.model} | ({"before": before.model} if before is not None else {})
    for model in students.values():
        depth, width = len(decoder_layers(model)), model.config.hidden_size
        if (depth, width) != (len(teacher.body.layers), teacher.hidden_size):
            raise UserError(
                f"student: {depth} layers x {width}, the teacher has {len(teacher.body.layers)} x {teacher.hidden_size}; "
                "experts are followed layer by layer, so both must agree"
            )
    kl = {}
    for name, found in (("after", scores), ("before", before_scores)):
        if found is not None:
            if found.kl_NS.shape != blocks.input_ids.shape:
                raise UserError("scores: of other blocks than `blocks`; evaluate the student on the same blocks")
            kl[name] = found.kl_NS.flatten()
    n, s = blocks.input_ids.shape
    follow = torch.linspace(0, s - 1, max(1, min(s, 512 // n))).round().long().unique()
    setup = _Setup(
        blocks, student.card, students, list(student.provenance), kl, Bootstrap(n, resamples, seed), least, sample, True, seed, follow,
        torch.Generator().manual_seed(seed),
    )  # fmt: skip
    setup.streams = {k: residual_streams(m, blocks, follow) for k, m in students.items()}
    return setup


def _measure_layer(layer: Any, watch: LayerWatch, setup: _Setup, tokenizer: Any) -> dict[str, Any]:
    assert layer.experts is not None and layer.top_k_index is not None
    experts, n = len(layer.experts), len(setup.blocks)
    real = layer.token_mask.cpu()
    chosen = torch.zeros(len(real), experts).scatter_(1, layer.top_k_index.cpu(), 1.0) * real[:, None]  # [T, E]
    count = chosen.sum(0)
    seen = count >= setup.least_tokens
    metrics: dict[str, list[Any]] = {
        "load": (count / real.sum()).tolist(),
        "mean_weight": (watch.weight / count.clamp(min=1)).tolist(),
        "alpha": (watch.weight / real.sum()).tolist(),
        "energy_share": (watch.energy / (watch.energy.sum() + _shared_energy(layer, real)).clamp(min=1e-30)).tolist(),
    }
    row: dict[str, Any] = {"index": layer.index, "tokens": count.long().tolist(), "measured": seen.tolist()}
    by_block = chosen.view(n, -1, experts).sum(1)
    row["blocks"] = (by_block > 0).sum(0).tolist()
    errors = _block_errors(layer, setup, chosen)
    metrics |= errors.pop("metrics")
    metrics |= _token_kl(setup, chosen, row)
    metrics |= _from_experts(layer, watch, setup, chosen, row)
    lift = cov.domain_lift(by_block.double().numpy(), list(setup.blocks.domains), seed=setup.seed)
    metrics["lift"] = lift["lift_E"].tolist()
    row |= {"domains": lift["share_ED"].round(4).tolist(), "lift_chance": lift["chance_E"].tolist()}
    provenance = setup.provenances[layer.index] if layer.index < len(setup.provenances) else None
    provenances = provenance_columns(provenance, experts, watch.width)
    metrics |= provenances.pop("metrics")
    row |= provenances
    unmeasured = (
        "coverage",
        "error_after",
        "error_before",
        "cosine_after",
        "cosine_before",
        "kl_after",
        "kl_before",
        "replaceability",
        "lift",
    )
    for key in unmeasured:
        if key in metrics:
            metrics[key] = [v if ok else None for v, ok in zip(metrics[key], row["measured"], strict=True)]
    row["metrics"] = metrics
    row |= {k: errors[k] for k in ("error_zero", "error_mean", "error_random")}
    drift = {f"stream_{k}": _drift(layer, s[layer.index], setup) for k, s in setup.streams.items()}
    row["rollup"] = layer_rollup(row) | errors["overall"] | drift
    row["contexts"] = watch.contexts(setup.blocks, tokenizer)
    return clean(row)


def _shared_energy(layer: Any, real: Tensor) -> Tensor:
    x = layer.x[real.to(layer.x.device)]
    parts = [s(x[i : i + PIECE]).double().square().sum().cpu() for s in layer.shared for i in range(0, len(x), PIECE)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def _drift(layer: Any, own: Tensor, setup: _Setup) -> float:
    """|h_S - h_T|^2 / |h_T|^2 of the residual stream after the layer, over the real tokens that are followed."""
    theirs = layer.hidden_out[:, setup.follow].flatten(0, 1).float().cpu()
    keep = _real(setup.blocks)[:, setup.follow].flatten()
    difference = (own - theirs)[keep].double().square().sum()
    return float(difference / theirs[keep].double().square().sum().clamp(min=1e-30))


def _block_errors(layer: Any, setup: _Setup, chosen: Tensor) -> dict[str, Any]:
    """Relative squared error and cosine of the student's FFN against the block output, by expert and over all tokens."""
    real = layer.token_mask.cpu().nonzero()[:, 0]
    size = torch.zeros(len(chosen), dtype=torch.float64)
    size[real] = layer.y[real].double().square().sum(1).cpu()
    mean = layer.y[real].double().mean(0)
    off_mean = torch.zeros_like(size)
    off_mean[real] = (layer.y[real].double() - mean).square().sum(1).cpu()
    routed = chosen.double()
    denominator = (routed.T @ size).clamp(min=1e-30)
    count = routed.sum(0).clamp(min=1)
    metrics: dict[str, Any] = {}
    overall: dict[str, Any] = {}
    for name, model in setup.students.items():
        error, cosine = _student_errors(layer, StudentLayer(decoder_layers(model)[layer.index], setup.card), real)
        full = torch.zeros_like(size).index_put_((real,), error)
        metrics[f"error_{name}"] = (routed.T @ full / denominator).tolist()
        metrics[f"cosine_{name}"] = (routed.T @ torch.zeros_like(size).index_put_((real,), cosine) / count).tolist()
        overall[f"error_{name}"] = float(full.sum() / size.sum().clamp(min=1e-30))
    return {
        "metrics": metrics,
        "overall": overall | {"error_mean": float(off_mean.sum() / size.sum().clamp(min=1e-30))},
        "error_zero": [1.0] * chosen.shape[1],
        "error_mean": (routed.T @ off_mean / denominator).tolist(),
        "error_random": _random_errors(layer, setup, chosen, real, size),
    }


def _student_errors(layer: Any, student: StudentLayer, real: Tensor) -> tuple[Tensor, Tensor]:
    given, norm = ffn_input(layer, student.layer)
    errors, cosines = [], []
    for i in range(0, len(real), PIECE):
        rows = real[i : i + PIECE]
        x = given[rows]
        out, _ = student(x if norm is None else norm(x.to(next(norm.parameters()))))
        y = layer.y[rows].float().to(out.device)
        errors.append((out - y).double().square().sum(1).cpu())
        cosines.append(torch.nn.functional.cosine_similarity(out, y, dim=1).double().cpu())
    return torch.cat(errors), torch.cat(cosines)


def _random_errors(layer: Any, setup: _Setup, chosen: Tensor, real: Tensor, size: Tensor) -> list[float | None]:
    """Block error by expert of a random FFN of the student's width whose output layer is fitted by ridge, on other tokens."""
    width = StudentLayer(decoder_layers(setup.students["after"])[layer.index], setup.card).width
    take = real[torch.randperm(len(real), generator=setup.generator)[: 2 * setup.sample]]
    if width is None or len(take) < 16:
        return [None] * chosen.shape[1]
    expert = layer.experts[0]
    features = _random(layer.x[take].float(), width, expert, setup)
    train = cov.split(len(take), setup.generator, held_out=0.5)
    errors = cov.ridge_errors(features, layer.y[take], train).double().cpu()
    test = take[~train]
    routed = chosen[test].double()
    count, found = routed.sum(0), routed.T @ errors / (routed.T @ size[test]).clamp(min=1e-30)
    return [float(v) if c >= 8 else None for v, c in zip(found, count, strict=True)]


def _random(x: Tensor, width: int, expert: ExpertWeights, setup: _Setup) -> Tensor:
    spread = float(expert.gate.std()), float(expert.up.std())
    return cov.random_features(x, width, *spread, setup.generator, expert.gating)


def _token_kl(setup: _Setup, chosen: Tensor, row: dict[str, Any]) -> dict[str, Any]:
    """Mean KL at the tokens routed to each expert, with the interval of the trained student's over blocks."""
    found: dict[str, Any] = {}
    n, experts = len(setup.blocks), chosen.shape[1]
    for name, kl in setup.kl.items():
        judged = (~kl.isnan()).float()
        total = (chosen * kl.nan_to_num(0)[:, None]).view(n, -1, experts).sum(1).double().numpy()
        count = (chosen * judged[:, None]).view(n, -1, experts).sum(1).double().numpy()
        estimates = [setup.bootstrap.mean(total[:, e], count[:, e]) for e in range(experts)]
        found[f"kl_{name}"] = [float(x) for x in estimates]
        if name == "after":
            row["kl_low"], row["kl_high"] = [x.low for x in estimates], [x.high for x in estimates]
    return found


def _from_experts(layer: Any, watch: LayerWatch, setup: _Setup, chosen: Tensor, row: dict[str, Any]) -> dict[str, Any]:
    """Coverage and replaceability: what needs each expert's weights once more."""
    student = StudentLayer(decoder_layers(setup.students["after"])[layer.index], setup.card)
    probes = watch.probes() if setup.replaceability else None
    if student.width is None and probes is None:
        return {}
    given, norm = ffn_input(layer, student.layer)
    covered: list[Estimate | None] = []
    cosine = torch.full((len(layer.experts), len(layer.experts)), -1.0)  # [owner of the tokens, other expert]
    for e in range(len(layer.experts)):
        measured = row["measured"][e]
        if not measured and probes is None:
            covered.append(None)
            continue
        expert = layer.experts[e]
        if measured and student.width is not None:
            covered.append(_coverage(layer, e, expert, student, (given, norm), setup, chosen))
        else:
            covered.append(None)
        if probes is not None:
            cosine[:, e] = probes.cosines(expert, layer.x)
    found: dict[str, Any] = {"coverage": covered} if student.width is not None else {}
    row["coverage_low"] = [None if c is None else c.low for c in covered]
    row["coverage_high"] = [None if c is None else c.high for c in covered]
    if probes is not None and len(layer.experts) > 1:
        best, who = cosine.fill_diagonal_(-1.0).max(1)
        found["replaceability"], row["replaced_by"] = best.tolist(), who.tolist()
    return found


def _coverage(
    layer: Any,
    e: int,
    expert: ExpertWeights,
    student: StudentLayer,
    given: tuple[Tensor, Any],
    setup: _Setup,
    chosen: Tensor,
) -> Estimate | None:
    rows = chosen[:, e].nonzero()[:, 0]
    if len(rows) > setup.sample:
        rows = rows[torch.randperm(len(rows), generator=setup.generator)[: setup.sample]]
    x = layer.x[rows].float()
    if setup.input_scaled:
        x = x * _weights(layer, rows, e)[:, None]
    hidden = expert.hidden(x.to(expert.dtype)).float()
    output = expert.output(hidden.to(expert.dtype)).float()
    tensor, norm = given
    theirs = tensor[rows] if norm is None else norm(tensor[rows].to(next(norm.parameters())))
    _, activations = student(theirs)
    assert activations is not None
    train = cov.split(len(rows), setup.generator)
    weights = cov.relative_weights(output)
    random, copied, width = [], [], activations.shape[1]
    for _ in range(max(1, min(8, 1024 // width))):  # narrow random FFNs differ much from one another
        features = _random(x, width, expert, setup)
        copy = torch.cat([hidden, features[:, : max(0, width - hidden.shape[1])]], 1)
        random.append(cov.ridge_errors(features, output, train, weights).cpu())
        copied.append(cov.ridge_errors(copy, output, train, weights).cpu())
    own = cov.ridge_errors(activations.to(output), output, train, weights).cpu()
    size = (output * weights[:, None])[~train].double().square().sum()
    return cov.coverage(
        own,
        torch.stack(random).mean(0),
        torch.stack(copied).mean(0),
        size=float(size),
        bootstrap=Bootstrap(len(own), 200, setup.seed),
    )


def _weights(layer: Any, rows: Tensor, e: int) -> Tensor:
    hit = (layer.top_k_index[rows] == e).float()
    return (layer.top_k_weights[rows].float() * hit).sum(1)
