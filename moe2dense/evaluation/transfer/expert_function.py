"""Coverage and replaceability: how much of each expert's function the student has, or another expert."""

from typing import Any

import torch
from torch import Tensor

from moe2dense.evaluation.bootstrap import Estimate
from moe2dense.evaluation.transfer import coverage
from moe2dense.evaluation.transfer.observer import LayerWatch
from moe2dense.evaluation.transfer.setup import TransferSetup
from moe2dense.evaluation.transfer.student_side import FFNInput, StudentLayer
from moe2dense.teacher.layer_pass import LayerPass

# T tokens, E experts, K top_k

RESAMPLES = 200  # of the works or passages of one expert's held-out tokens
RANDOM_NEURONS = 1024  # a narrow random FFN is drawn several times, for narrow ones differ much from one another


def expert_function(
    layer: LayerPass, watch: LayerWatch, setup: TransferSetup, chosen: Tensor, measured: list[bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (metrics by expert, other columns of the layer): what needs each expert's weights once more.

    chosen [T, E]: 1 where a token is routed to an expert; measured: experts with enough tokens.
    """
    assert layer.experts is not None
    student = setup.student_layer(layer.index)
    probes = watch.probes() if setup.options.replaceability else None
    if student.width is None and probes is None:
        return {}, {}
    inputs = FFNInput(layer, student)
    width = student.width or 0
    draws = max(1, min(8, RANDOM_NEURONS // max(width, 1)))
    drawn = [coverage.random_ffn(width, layer.x.shape[1], setup.generator) for _ in range(draws)] if width else []
    baselines = [ffn.to(torch.device(layer.experts.device)) for ffn in drawn]
    covered: list[Estimate | None] = []
    cosine = torch.full((len(layer.experts), len(layer.experts)), -1.0)  # [owner of the tokens, other expert]
    for e in range(len(layer.experts)):
        if not measured[e] and probes is None:
            covered.append(None)
            continue
        expert = layer.experts[e]
        rows = _sampled_rows(chosen[:, e], setup) if measured[e] and width else None
        covered.append(None if rows is None else _expert_coverage(layer, e, rows, student, inputs, setup, baselines))
        if probes is not None:
            cosine[:, e] = probes.cosines(expert, layer.x)
    metrics: dict[str, Any] = {"coverage": covered} if student.width is not None else {}
    columns: dict[str, Any] = {
        "coverage_low": [None if c is None else c.low for c in covered],
        "coverage_high": [None if c is None else c.high for c in covered],
    }
    if probes is not None and len(layer.experts) > 1:
        best, other = cosine.fill_diagonal_(-1.0).max(1)
        metrics["replaceability"], columns["replaced_by"] = best.tolist(), other.tolist()
    return metrics, columns


def _sampled_rows(routed: Tensor, setup: TransferSetup) -> Tensor:
    """Return a sample of the tokens that are routed to an expert; routed [T] is 1 there."""
    rows = routed.nonzero()[:, 0]
    if len(rows) > setup.options.sample:
        rows = rows[torch.randperm(len(rows), generator=setup.generator)[: setup.options.sample]]
    return rows


def _expert_coverage(
    layer: LayerPass,
    e: int,
    rows: Tensor,
    student: StudentLayer,
    inputs: FFNInput,
    setup: TransferSetup,
    baselines: list[coverage.RandomFFN],
) -> Estimate | None:
    """Measure one expert's coverage on the tokens `rows`; None where there is nothing to tell apart."""
    assert layer.experts is not None
    expert = layer.experts[e]
    x = layer.x[rows].float().to(expert.device)
    if setup.input_scaled:
        x = x * _routing_weights(layer, rows, e)[:, None].to(x.device)
    hidden = expert.hidden(x.to(expert.dtype)).float()
    output = expert.output(hidden.to(expert.dtype)).float()
    _, activations = student(inputs.at(rows))
    assert activations is not None
    train = coverage.split(len(rows), setup.generator)
    weights = coverage.relative_weights(output)
    random_errors, copy_errors, width = [], [], activations.shape[1]

    def errors(features: Tensor) -> Tensor:
        return coverage.tempered(coverage.ridge_errors(features, output, train, weights)).cpu()

    for baseline in baselines:
        features = baseline.features(x, expert)
        copy = torch.cat([hidden, features[:, : max(0, width - hidden.shape[1])]], 1)
        random_errors.append(errors(features))
        copy_errors.append(errors(copy))
    student_errors = errors(activations.to(output))
    size = (output * weights[:, None])[~train].double().square().sum()
    return coverage.coverage(
        student_errors,
        torch.stack(random_errors).mean(0),
        torch.stack(copy_errors).mean(0),
        size=float(size),
        cluster=setup.cluster[rows][~train],
        resamples=RESAMPLES,
        seed=setup.options.seed,
    )


def _routing_weights(layer: LayerPass, rows: Tensor, e: int) -> Tensor:
    """Return the weight that the router gives expert `e` at the tokens `rows`."""
    assert layer.top_k_index is not None and layer.top_k_weights is not None
    routed = (layer.top_k_index[rows] == e).float()
    return (layer.top_k_weights[rows].float() * routed).sum(1)
