"""How far the student's FFN is from the teacher's MoE block on the same inputs, by expert and over all tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe2dense.evaluation.transfer import coverage
from moe2dense.evaluation.transfer.setup import TransferSetup, real_tokens
from moe2dense.evaluation.transfer.student_side import FFNInput, StudentLayer
from moe2dense.teacher.layer_pass import LayerPass

# T tokens, E experts, n real tokens, D tokens followed through the depth, H hidden size

CHUNK = 4096  # tokens that a student's FFN sees at once
LEAST_FITTED = 16  # tokens below which no random FFN is fitted
LEAST_TESTED = 8  # held-out tokens below which an expert has no number of the random FFN


@dataclass
class BlockErrors:
    """Relative squared errors and cosines of one layer.

    metrics: of the students, by expert. baselines: of no output, the mean output and a fitted random FFN, by expert.
    overall: over all tokens of the layer.
    """

    metrics: dict[str, list[float]]
    baselines: dict[str, list[Any]]
    overall: dict[str, float]


def block_errors(layer: LayerPass, setup: TransferSetup, chosen: Tensor) -> BlockErrors:
    """Compare the students' FFNs with the block output; chosen [T, E] is 1 where a token is routed to an expert."""
    real = layer.token_mask.cpu().nonzero()[:, 0]
    size = torch.zeros(len(chosen), dtype=torch.float64)
    size[real] = layer.y[real].double().square().sum(1).cpu()
    mean = layer.y[real].double().mean(0)
    off_mean = torch.zeros_like(size)
    off_mean[real] = (layer.y[real].double() - mean).square().sum(1).cpu()
    routed = chosen.double()
    denominator = (routed.T @ size).clamp(min=1e-30)
    count = routed.sum(0).clamp(min=1)
    metrics: dict[str, list[float]] = {}
    overall: dict[str, float] = {}
    for name in setup.students:
        error, cosine = _student_errors(layer, setup.student_layer(layer.index, name), real)
        full = torch.zeros_like(size).index_put_((real,), error)
        metrics[f"error_{name}"] = (routed.T @ full / denominator).tolist()
        metrics[f"cosine_{name}"] = (routed.T @ torch.zeros_like(size).index_put_((real,), cosine) / count).tolist()
        overall[f"error_{name}"] = float(full.sum() / size.sum().clamp(min=1e-30))
    overall["error_mean"] = float(off_mean.sum() / size.sum().clamp(min=1e-30))
    baselines = {
        "error_zero": [1.0] * chosen.shape[1],
        "error_mean": (routed.T @ off_mean / denominator).tolist(),
        "error_random": _random_errors(layer, setup, chosen, real, size),
    }
    return BlockErrors(metrics, baselines, overall)


def _student_errors(layer: LayerPass, student: StudentLayer, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return (squared error [n], cosine [n]) of the student's FFN at the real tokens."""
    inputs = FFNInput(layer, student)
    errors, cosines = [], []
    for i in range(0, len(real), CHUNK):
        rows = real[i : i + CHUNK]
        output, _ = student(inputs.at(rows))
        y = layer.y[rows].float().to(output.device)
        errors.append((output - y).double().square().sum(1).cpu())
        cosines.append(torch.nn.functional.cosine_similarity(output, y, dim=1).double().cpu())
    return torch.cat(errors), torch.cat(cosines)


def _random_errors(
    layer: LayerPass, setup: TransferSetup, chosen: Tensor, real: Tensor, size: Tensor
) -> list[float | None]:
    """Return the block error by expert of a random FFN of the student's width, its output layer fitted by ridge on other tokens."""
    assert layer.experts is not None
    width = setup.student_layer(layer.index).width
    sampled = real[torch.randperm(len(real), generator=setup.generator)[: 2 * setup.options.sample]]
    if width is None or len(sampled) < LEAST_FITTED:
        return [None] * chosen.shape[1]
    expert = layer.experts[0]
    random = coverage.random_ffn(width, layer.x.shape[1], setup.generator).to(expert.device)
    features = random.features(layer.x[sampled].float().to(expert.device), expert)
    train = coverage.split(len(sampled), setup.generator, held_out=0.5)
    errors = coverage.ridge_errors(features, layer.y[sampled].to(features), train).double().cpu()
    test = sampled[~train]
    routed = chosen[test].double()
    relative = routed.T @ errors / (routed.T @ size[test]).clamp(min=1e-30)
    return [float(e) if c >= LEAST_TESTED else None for e, c in zip(relative, routed.sum(0), strict=True)]


def stream_drift(layer: LayerPass, student_stream: Tensor, setup: TransferSetup) -> float:
    """Return |h_S - h_T|^2 / |h_T|^2 of the residual stream after the layer, over the real tokens that are followed.

    student_stream [D, H]: the student's own.
    """
    teacher_stream = layer.hidden_out[:, setup.followed].flatten(0, 1).float().cpu()
    keep = real_tokens(setup.blocks)[:, setup.followed].flatten()
    difference = (student_stream - teacher_stream)[keep].double().square().sum()
    return float(difference / teacher_stream[keep].double().square().sum().clamp(min=1e-30))
