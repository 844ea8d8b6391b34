"""Build one layer of the student: its FFN is made, refitted and fitted, then the whole layer is fitted.

Each fit keeps the step that is best on held-out blocks. Of several processes each has some of the blocks, and all end with the
same layer: sums over tokens and gradients are those of all.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe2dense.common.devices import by_rows, device_with_room
from moe2dense.common.processes import add_over_processes, world
from moe2dense.common.shared_rows import any_row, mean_of_rows, same_as_first, share_of_rows
from moe2dense.modeling import internals
from moe2dense.student.build.assemble import put_ffn
from moe2dense.student.build.cost import choose_count
from moe2dense.student.build.state import BuildState
from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.errors import relative_error, weights_by_size, wide_enough
from moe2dense.student.ffn.local import local
from moe2dense.student.ffn.make import make_ffn
from moe2dense.student.ffn.refit import refit, refit_by_held_out
from moe2dense.student.ffn.task import FFNTask
from moe2dense.student.fit import Fit, fit, fit_at_a_rate_that_helps
from moe2dense.student.footprint import layer_bytes, pool_limit, refit_limit
from moe2dense.student.memory import release_freed_memory
from moe2dense.student.prune.views import mean_gate
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.layer_pass import LayerPass

# N blocks, S block length, T = N * S tokens, H hidden, E experts, M student FFN width


def build_layer(state: BuildState, layer_pass: LayerPass, index: int) -> tuple[LayerProvenance | None, dict[str, Any]]:
    """Make the student's layer `index` do what the teacher's layer does; return its provenance and a record of errors."""
    runner = state.runner
    ffn, provenance, record = build_ffn(state, layer_pass, index)
    put_ffn(runner.ffn(index), runner.card, ffn.to(runner.device))
    del ffn
    release_freed_memory()
    if "layer" in state.steps and state.config.layer_steps and any_row(state.held_out):
        record |= fit_layer(state, layer_pass, index)
    if world()[1] > 1:
        for value in internals.saved_tensors(runner.body.layers[index]).values():
            value.data.copy_(same_as_first(value.detach()))  # equal already, where devices of one kind round alike
    record["error"] = float(layer_error(state, layer_pass, index, torch.ones_like(state.held_out)))
    return provenance, {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}


def build_ffn(
    state: BuildState, layer_pass: LayerPass, index: int
) -> tuple[DenseFFN, LayerProvenance | None, dict[str, Any]]:
    """Make, refit and fit one layer's FFN; return it with its provenance and the errors after each step."""
    x, target = ffn_inputs_and_targets(state, layer_pass, index)
    weights = block_weights(state, layer_pass).flatten()[state.real_tokens].to(x.device)
    held_out = held_out_tokens(state).to(x.device)
    judged = any_row(held_out)
    judge = held_out if judged else torch.ones_like(held_out)
    with torch.no_grad():
        task = task_of(state, layer_pass, x[~held_out], target[~held_out], weights[~held_out])
        ffn, provenance = make_ffn(task, state.base)
        device = fit_device(state, ffn, x)

        def error(candidate: DenseFFN) -> float:
            return relative_error(candidate.to(device), x[judge], target[judge], weights[judge])

        record: dict[str, Any] = {"layer": index, **_pool_record(task), "error_init": error(ffn)}
        if "refit" in state.steps:
            ffn, record["ridge"] = _refit(state, ffn, x, target, held_out, weights, device)
            record["error_refit"] = error(ffn)
    if "local" in state.steps and judged:
        ffn, fit_record = fit_ffn(state, ffn, x, target, weights, index)
        record |= fit_record
    return ffn, provenance, record


def _pool_record(task: FFNTask) -> dict[str, int]:
    """Return how many of a layer's neurons an elimination could choose from, where memory keeps it from all of them."""
    neurons = sum(len(energy) for energy in task.energies) if task.experts else 0
    return {"pool": task.pool_limit, "neurons": neurons} if 0 < task.pool_limit < neurons else {}


def _refit(
    state: BuildState,
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    held_out: Tensor,
    weights: Tensor,
    device: torch.device,
) -> tuple[DenseFFN, float | None]:
    """Refit on the tokens that are not held out, with the ridge that is set or the one that is best on those that are."""
    limit = refit_limit(state.build_bytes)
    if state.config.ridge:
        fitted, ridge = ~held_out, state.config.ridge
        return refit(ffn, x[fitted], target[fitted], ridge, limit, device, weights=weights[fitted]), ridge
    result = refit_by_held_out(ffn, x, target, held_out, state.ridge, limit, device, weights)
    return result.ffn, result.ridge


def fit_ffn(
    state: BuildState, ffn: DenseFFN, x: Tensor, target: Tensor, weights: Tensor, index: int
) -> tuple[DenseFFN, dict[str, Any]]:
    """Fit an FFN to target [T, H] on inputs x [T, H] by gradient steps; return it and the fit's record."""
    config, device, held_out = state.config, fit_device(state, ffn, x), held_out_tokens(state).to(x.device)
    fitted = ffn

    def run(rate: float) -> Fit:
        nonlocal fitted
        settings = (config.local_steps, rate, config.local_batch, state.seed + index)
        fitted, result = local(ffn, x, target, held_out, *settings, device, weights)
        return result

    result, rate = fit_at_a_rate_that_helps(run, state.rates.get("local", config.local_lr))
    return fitted, _fit_record("local", result, rate)


def task_of(state: BuildState, layer_pass: LayerPass, x: Tensor, target: Tensor, weights: Tensor) -> FFNTask:
    """Return what the methods need to know of a layer, whose FFN is to write target [T, H] on inputs x [T, H].

    weights [T]: how much each token's squared error counts.
    """
    always_on = [] if layer_pass.sparse else [dense(layer_pass.dense)]
    probability = None
    if layer_pass.sparse:
        always_on = [dense(part.weights, mean_gate(part.gate, layer_pass)) for part in layer_pass.shared]
        assert layer_pass.router_logits is not None
        probability = layer_pass.router_logits[layer_pass.token_mask].float().softmax(-1).sum(0)
        add_over_processes(probability)
    index, hidden_size = layer_pass.index, x.shape[1]
    task = FFNTask(
        width=state.target.width, hidden_size=hidden_size, x=x, target=target, weights=weights, always_on=always_on,
        experts=layer_pass.experts or (), stats=state.stats[index] if layer_pass.sparse else None, probability=probability,
        input_scaled=bool(state.teacher.card and state.teacher.card.input_scaled),
        seed=state.seed * 1000 + index, std=getattr(state.target.config, "initializer_range", 0.02), config=state.config,
        pool_limit=pool_limit(state.build_bytes, state.target.width, hidden_size), device=state.runner.device,
        share=share_of_rows(len(x)),
    )  # fmt: skip
    if always_on:
        return replace(task, gating=always_on[0].gating)
    return replace(task, gating=layer_pass.experts.gating) if layer_pass.experts else task


def ffn_inputs_and_targets(state: BuildState, layer_pass: LayerPass, index: int) -> tuple[Tensor, Tensor]:
    """Return what enters the student's FFN [T, H], and what it should write [T, H] to end where the teacher's layer does.

    Rows are the real tokens.
    """
    entering, rest = state.runner.before_ffn(index, state.hidden)
    x = entering.reshape(-1, entering.shape[2])[state.real_tokens]
    if state.runner.card.join == "post_norm":
        # what is normed afterwards; only the fit of the layer works through the norm
        return x, layer_pass.y[state.real_tokens.to(layer_pass.y.device)].to(x)
    for rows in state.runner.chunks():
        rest[rows] = rest[rows].sub_(layer_pass.hidden_out[rows].to(rest)).neg_()
    return x, rest.reshape(-1, rest.shape[2])[state.real_tokens].div_(state.runner.multiplier())


def fit_device(state: BuildState, ffn: DenseFFN, x: Tensor) -> torch.device:
    """Return the device for refitting and fitting an FFN: where layers compute, if all of it fits there.

    Inputs x [T, H] are brought there some tokens at a time.
    """
    parameters = sum(p.numel() for p in ffn.parameters())
    limit = refit_limit(state.build_bytes)
    need = layer_bytes(parameters, parameters, ffn.width, x.shape[1], 0, len(x), limit, state.config.local_batch)
    return device_with_room(state.runner.device, need)


def _fit_record(name: str, result: Fit, rate: float) -> dict[str, Any]:
    return {
        f"{name}_before": result.before,
        f"{name}_after": result.after,
        f"{name}_best_step": result.best_step,
        f"{name}_rate": rate,
    }


@torch.no_grad()
def layer_error(state: BuildState, layer_pass: LayerPass, index: int, blocks: Tensor) -> float:
    """Return the squared error of the student's layer, over the squared change that the teacher's layer makes.

    Each token's count relative to the size of its hidden state (`weights_by_size`), on the real tokens of `blocks` [N]
    bool, of all processes; NaN where there are none.
    """
    runner, weights = state.runner, block_weights(state, layer_pass)
    sums = torch.zeros(2, dtype=torch.float64, device=runner.device)
    for rows in runner.chunks():
        picked = torch.arange(rows.start, rows.stop)[blocks[rows]]
        if len(picked) == 0:
            continue
        output = runner.call(index, state.hidden[picked], picked)
        weight = weights[picked].unsqueeze(-1)
        before, after = (t[picked].to(output) for t in (layer_pass.hidden_in, layer_pass.hidden_out))
        sums[0] += ((output - after).pow(2) * weight).sum()
        sums[1] += ((after - before).pow(2) * weight).sum()
    add_over_processes(sums)
    missed, size = sums
    return float(missed) / max(float(size), 1e-30) if float(size) else math.nan


def block_weights(state: BuildState, layer_pass: LayerPass) -> Tensor:
    """Return [N, S] how much each token's squared error counts: by `weights_by_size`, 0 for padding; where layers compute."""
    shape, device = layer_pass.hidden_out.shape, state.runner.device
    real = state.real_tokens
    states = layer_pass.hidden_out.reshape(-1, shape[2])[real.to(layer_pass.hidden_out.device)]
    weights = torch.zeros(shape[0] * shape[1], device=device)
    weights[real.to(device)] = weights_by_size(states, device).to(weights)
    return weights.view(shape[:2])


def fit_layer(state: BuildState, layer_pass: LayerPass, index: int) -> dict[str, Any]:
    """Train a whole decoder layer towards what the teacher's layer returns, on the student's own hidden states.

    Returns the fit's record.
    """
    runner, config = state.runner, state.config
    layer = runner.body.layers[index]
    rows = torch.nonzero(~state.held_out).flatten()
    weights = block_weights(state, layer_pass)
    streams = [layer_pass.hidden_out, layer_pass.hidden_in]
    change = by_rows(
        lambda after, before: (wide_enough(after) - wide_enough(before)).pow(2).mean(2), streams, runner.device, 8
    )
    scale = mean_of_rows(change.to(runner.device) * weights).clamp_min(1e-30)

    def loss(pick: Tensor) -> Tensor:
        blocks = rows[pick]
        output = runner.call(index, state.hidden[blocks], blocks)
        missed = (output - layer_pass.hidden_out[blocks].to(output)).pow(2)
        return (missed.mean(2) * weights[blocks]).mean() / scale

    def held_out_loss() -> float:
        return layer_error(state, layer_pass, index, state.held_out)

    batch = max(1, config.layer_batch // layer_pass.hidden_in.shape[1])
    steps, seed = config.layer_steps, state.seed + index
    parameters: list[Tensor] = list(layer.parameters())
    share = share_of_rows(len(rows))

    def run(rate: float) -> Fit:
        return fit(parameters, loss, held_out_loss, share, steps, rate, batch, seed, clip=1.0)

    return _fit_record("layer", *fit_at_a_rate_that_helps(run, state.rates.get("layer", config.layer_lr)))


def held_out_tokens(state: BuildState) -> Tensor:
    """Return [T] bool: the real tokens of the blocks that are held out."""
    return state.held_out.repeat_interleave(state.runner.ids.shape[1])[state.real_tokens]


def choose_held_out(blocks: int, share: float, seed: int) -> Tensor:
    """Return [N] bool: the blocks that no fit sees; at least one of several, none of a single one."""
    held_out = torch.zeros(blocks, dtype=torch.bool)
    count = choose_count(blocks, share)
    if count > 0:
        held_out[torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return held_out
