"""One layer of the student: its FFN made, refitted and fitted, then the whole layer fitted, each step kept only where it helps."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe2dense.student.build.assemble import put_ffn
from moe2dense.student.build.state import BuildState
from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.local import local, relative_error
from moe2dense.student.ffn.make import make_ffn
from moe2dense.student.ffn.refit import refit
from moe2dense.student.ffn.task import FFNTask
from moe2dense.student.fit import Fit, fit
from moe2dense.student.footprint import layer_bytes, pool_limit, refit_limit
from moe2dense.student.memory import device_with_room, release_freed_memory
from moe2dense.student.prune.cut import mean_gate
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.layer_pass import LayerPass

# N blocks, S block length, T = N * S tokens, H hidden, E experts, M student FFN width


def block_of(state: BuildState, made: LayerPass, x: Tensor, target: Tensor) -> FFNTask:
    """What the methods are told of a layer."""
    always_on = [] if made.sparse else [dense(made.dense)]
    probability = None
    if made.sparse:
        always_on = [dense(part.weights, mean_gate(part.gate, made)) for part in made.shared]
        assert made.router_logits is not None
        probability = made.router_logits[made.token_mask].float().softmax(-1).sum(0)
    gating = always_on[0].gating if always_on else made.experts[0].gating if made.experts else None
    hidden_size = x.shape[1]
    task = FFNTask(
        width=state.target.width, hidden_size=hidden_size, x=x, target=target, always_on=always_on,
        experts=made.experts or (), stats=state.stats[made.index] if made.sparse else None, probability=probability,
        input_scaled=bool(state.teacher.card and state.teacher.card.input_scaled),
        seed=state.seed * 1000 + made.index, std=getattr(state.target.config, "initializer_range", 0.02), config=state.config,
        pool_limit=pool_limit(state.teacher.budget // 2, state.target.width, hidden_size), device=state.teacher.device,
    )  # fmt: skip
    return replace(task, gating=gating) if gating else task


def seen_and_wanted(state: BuildState, made: LayerPass, index: int) -> tuple[Tensor, Tensor]:
    """(x [T, H] what enters the student's FFN, [T, H] what it should write to end where the teacher's layer does), real tokens only."""
    entered, rest = state.runner.before_ffn(index, state.hidden)
    x = entered.reshape(-1, entered.shape[2])[state.real]
    if state.runner.card.join == "post_norm":
        return x, made.y[state.real]  # what is normed afterwards; the layer fit works through the norm
    rest = rest.sub_(made.hidden_out).neg_()
    return x, rest.reshape(-1, rest.shape[2])[state.real].div_(state.runner.multiplier())


def place_for(state: BuildState, ffn: DenseFFN, x: Tensor) -> torch.device:
    """Where an FFN is refitted and fitted on inputs x [T, H]: beside its matrices, x and the target are there."""
    numbers = sum(p.numel() for p in ffn.parameters())
    limit = refit_limit(state.teacher.budget // 2)
    fits = layer_bytes(numbers, numbers, ffn.width, x.shape[1], 0, len(x), limit, state.config.local_batch)
    return device_with_room(state.teacher.device, fits + 2 * x.nbytes)


def build_ffn(
    state: BuildState, made: LayerPass, index: int
) -> tuple[DenseFFN, LayerProvenance | None, dict[str, Any]]:
    """Method, refit and local fit of one layer's FFN, with the errors after each."""
    config = state.config
    x, wanted = seen_and_wanted(state, made, index)
    held = state.held.repeat_interleave(made.hidden_in.shape[1])[state.real]
    with torch.no_grad():
        ffn, provenance = make_ffn(block_of(state, made, x, wanted), state.base)
        limit, device = refit_limit(state.teacher.budget // 2), place_for(state, ffn, x)
        record: dict[str, Any] = {"layer": index, "error_init": relative_error(ffn.to(device), x, wanted)}
        if "refit" in state.steps:
            ffn = refit(ffn, x, wanted, config.ridge, limit, device)
            record["error_refit"] = relative_error(ffn.to(device), x, wanted)
    if "local" in state.steps and bool(held.any()):
        ffn, done = local(
            ffn, x, wanted, held, config.local_steps, config.local_lr, config.local_batch, state.seed + index, device
        )
        record |= _fit_record("local", done)
    return ffn, provenance, record


def build_layer(state: BuildState, made: LayerPass, index: int) -> tuple[LayerProvenance | None, dict[str, Any]]:
    """Make the student's layer `index` to do what the teacher's pass `made` does; returns its provenance and a record of the errors."""
    runner = state.runner
    ffn, provenance, record = build_ffn(state, made, index)
    put_ffn(runner.ffn(index), runner.card, ffn)
    del ffn
    release_freed_memory()
    if "layer" in state.steps and state.config.layer_steps and bool(state.held.any()):
        record |= _fit_record("layer", fit_layer(state, made, index))
    record["error"] = float(layer_error(state, made, index, torch.ones_like(state.held)))
    return provenance, {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}


def _fit_record(name: str, done: Fit) -> dict[str, Any]:
    return {f"{name}_before": done.before, f"{name}_after": done.after, f"{name}_best_step": done.best_step}


@torch.no_grad()
def layer_error(state: BuildState, made: LayerPass, index: int, blocks: Tensor) -> float:
    """|student's layer output - teacher's|^2 over the change that the teacher's layer makes, on the real tokens of `blocks` [N] bool."""
    runner, missed, size = state.runner, 0.0, 0.0
    real = state.real.view(made.hidden_in.shape[:2])
    for rows in runner.chunks():
        picked = torch.arange(rows.start, rows.stop)[blocks[rows]]
        if len(picked) == 0:
            continue
        got = runner.call(index, state.hidden[picked], picked)
        weight = real[picked].unsqueeze(-1)
        missed += float(((got - made.hidden_out[picked]).pow(2) * weight).sum())
        size += float(((made.hidden_out[picked] - made.hidden_in[picked]).pow(2) * weight).sum())
    return missed / max(size, 1e-30) if size else math.nan


def fit_layer(state: BuildState, made: LayerPass, index: int) -> Fit:
    """Train the whole decoder layer (attention and norms too) towards what the teacher's layer returns on the student's own hidden states."""
    runner, config = state.runner, state.config
    layer = runner.body.layers[index]
    rows = torch.nonzero(~state.held).flatten()
    real = state.real.view(made.hidden_in.shape[:2])
    scale = (made.hidden_out - made.hidden_in).pow(2).mean().clamp_min(1e-30)

    def loss(pick: Tensor) -> Tensor:
        blocks = rows[pick]
        missed = (runner.call(index, state.hidden[blocks], blocks) - made.hidden_out[blocks]).pow(2)
        weight = real[blocks].unsqueeze(-1)
        return (missed * weight).sum() / (weight.sum().clamp_min(1) * missed.shape[-1]) / scale

    def check() -> float:
        return layer_error(state, made, index, state.held)

    batch = max(1, config.layer_batch // made.hidden_in.shape[1])
    return fit(
        list(layer.parameters()),
        loss,
        check,
        len(rows),
        config.layer_steps,
        config.layer_lr,
        batch,
        state.seed + index,
        clip=1.0,
    )


def held_out(blocks: int, share: float, seed: int) -> Tensor:
    """[N] bool: the blocks kept back from fitting; at least one of several, none of a single one."""
    held = torch.zeros(blocks, dtype=torch.bool)
    count = min(blocks - 1, max(1, round(share * blocks)))
    if count > 0:
        held[torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return held


def on_cpu(made: LayerPass) -> LayerPass:
    """A layer's pass with its hidden states and routing on the CPU in float32, where students are built."""
    if made.hidden_in.device.type == "cpu" and made.hidden_in.dtype == torch.float32:
        return made
    names = ("hidden_in", "hidden_out", "x", "y", "router_logits")
    moved = {name: value.to("cpu", torch.float32) for name in names if (value := getattr(made, name)) is not None}
    return replace(made, token_mask=made.token_mask.cpu(), **moved)
