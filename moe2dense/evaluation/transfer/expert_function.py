"""Coverage and replaceability: how much of each expert's function the student has, or another expert."""

from typing import Any

import torch
from torch import Tensor

from moe2dense.evaluation.bootstrap import Bootstrap, Estimate
from moe2dense.evaluation.transfer import coverage
from moe2dense.evaluation.transfer.observer import LayerWatch
from moe2dense.evaluation.transfer.setup import TransferSetup
from moe2dense.evaluation.transfer.student_side import FFNInput, StudentLayer, ffn_input
from moe2dense.teacher.experts import ExpertWeights
from moe2dense.teacher.layer_pass import LayerPass

# T tokens, E experts, K top_k

RESAMPLES = 200  # of the held-out tokens of one expert
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
    inputs = ffn_input(layer, student.layer)
    covered: list[Estimate | None] = []
    cosine = torch.full((len(layer.experts), len(layer.experts)), -1.0)  # [owner of the tokens, other expert]
    for e in range(len(layer.experts)):
        if not measured[e] and probes is None:
            covered.append(None)
            continue
        expert = layer.experts[e]
        watchable = measured[e] and student.width is not None
        covered.append(_expert_coverage(layer, e, expert, student, inputs, setup, chosen) if watchable else None)
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


def _expert_coverage(
    layer: LayerPass,
    e: int,
    expert: ExpertWeights,
    student: StudentLayer,
    inputs: FFNInput,
    setup: TransferSetup,
    chosen: Tensor,
) -> Estimate | None:
    """Measure one expert's coverage on a sample of its tokens; None where there is nothing to tell apart."""
    rows = chosen[:, e].nonzero()[:, 0]
    if len(rows) > setup.options.sample:
        rows = rows[torch.randperm(len(rows), generator=setup.generator)[: setup.options.sample]]
    x = layer.x[rows].float()
    if setup.input_scaled:
        x = x * _routing_weights(layer, rows, e)[:, None]
    hidden = expert.hidden(x.to(expert.dtype)).float()
    output = expert.output(hidden.to(expert.dtype)).float()
    _, activations = student(inputs.at(rows))
    assert activations is not None
    train = coverage.split(len(rows), setup.generator)
    weights = coverage.relative_weights(output)
    random_errors, copy_errors, width = [], [], activations.shape[1]
    for _ in range(max(1, min(8, RANDOM_NEURONS // width))):
        features = coverage.random_features_like(expert, x, width, setup.generator)
        copy = torch.cat([hidden, features[:, : max(0, width - hidden.shape[1])]], 1)
        random_errors.append(coverage.ridge_errors(features, output, train, weights).cpu())
        copy_errors.append(coverage.ridge_errors(copy, output, train, weights).cpu())
    student_errors = coverage.ridge_errors(activations.to(output), output, train, weights).cpu()
    size = (output * weights[:, None])[~train].double().square().sum()
    return coverage.coverage(
        student_errors,
        torch.stack(random_errors).mean(0),
        torch.stack(copy_errors).mean(0),
        size=float(size),
        bootstrap=Bootstrap(len(student_errors), RESAMPLES, setup.options.seed),
    )


def _routing_weights(layer: LayerPass, rows: Tensor, e: int) -> Tensor:
    """Return the weight that the router gives expert `e` at the tokens `rows`."""
    assert layer.top_k_index is not None and layer.top_k_weights is not None
    routed = (layer.top_k_index[rows] == e).float()
    return (layer.top_k_weights[rows].float() * routed).sum(1)
