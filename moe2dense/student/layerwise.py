"""One layer of the student: its FFN made, refitted and fitted, then the whole layer fitted, each step kept only where it helps."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe2dense.config import WalkConfig
from moe2dense.student.assemble import put_ffn
from moe2dense.student.carry import Carrier
from moe2dense.student.device import with_room
from moe2dense.student.ffn.local import Fit, fit, local, relative_error
from moe2dense.student.ffn.refit import refit
from moe2dense.student.footprint import layer_bytes, pool_limit, refit_limit
from moe2dense.student.heap import give_back
from moe2dense.student.methods import Block, make_ffn
from moe2dense.student.prune import mean_gate
from moe2dense.student.target import Target
from moe2dense.student.types import DenseFFN, LayerFate, dense
from moe2dense.teacher.capture import RoutingStats
from moe2dense.teacher.load import Teacher
from moe2dense.teacher.stream import LayerPass

# N blocks, S block length, T = N * S tokens, H hidden, E experts, M student FFN width


@dataclass
class Walk:
    """The state of a walk: the student so far, its hidden states, and what is asked of each layer."""

    teacher: Teacher
    carrier: Carrier
    target: Target
    base: str
    steps: list[str]
    config: WalkConfig
    seed: int
    held: Tensor  # [N] bool: blocks kept back from every fit, to choose the step
    real: Tensor  # [T] bool
    stats: RoutingStats
    hidden: Tensor  # [N, S, H] the student's
    fate: list[LayerFate | None] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def block_of(state: Walk, made: LayerPass, x: Tensor, target: Tensor) -> Block:
    """What the methods are told of a layer."""
    fixed = [] if made.sparse else [dense(made.dense)]
    probability = None
    if made.sparse:
        fixed = [dense(part.weights, mean_gate(part.gate, made)) for part in made.shared]
        assert made.router_logits is not None
        probability = made.router_logits[made.token_mask].float().softmax(-1).sum(0)
    gating = fixed[0].gating if fixed else made.experts[0].gating if made.experts else None
    hidden_size = x.shape[1]
    block = Block(
        width=state.target.width, hidden_size=hidden_size, x=x, target=target, fixed=fixed,
        experts=made.experts or (), stats=state.stats[made.index] if made.sparse else None, probability=probability,
        input_scaled=bool(state.teacher.card and state.teacher.card.input_scaled),
        seed=state.seed * 1000 + made.index, std=getattr(state.target.config, "initializer_range", 0.02), config=state.config,
        pool_limit=pool_limit(state.teacher.budget // 2, state.target.width, hidden_size), device=state.teacher.device,
    )  # fmt: skip
    return replace(block, gating=gating) if gating else block


def seen_and_wanted(state: Walk, made: LayerPass, index: int) -> tuple[Tensor, Tensor]:
    """(x [T, H] what enters the student's FFN, [T, H] what it should write to end where the teacher's layer does), real tokens only."""
    entered, rest = state.carrier.before_ffn(index, state.hidden)
    x = entered.reshape(-1, entered.shape[2])[state.real]
    if state.carrier.card.join == "post_norm":
        return x, made.y[state.real]  # what is normed afterwards; the layer fit works through the norm
    rest = rest.sub_(made.hidden_out).neg_()
    return x, rest.reshape(-1, rest.shape[2])[state.real].div_(state.carrier.multiplier())


def place_for(state: Walk, ffn: DenseFFN, x: Tensor) -> torch.device:
    """Where an FFN is refitted and fitted on inputs x [T, H]: beside its matrices, x and the target are there."""
    numbers = sum(p.numel() for p in ffn.parameters())
    limit = refit_limit(state.teacher.budget // 2)
    fits = layer_bytes(numbers, numbers, ffn.width, x.shape[1], 0, len(x), limit, state.config.local_batch)
    return with_room(state.teacher.device, fits + 2 * x.nbytes)


def build_ffn(state: Walk, made: LayerPass, index: int) -> tuple[DenseFFN, LayerFate | None, dict[str, Any]]:
    """Method, refit and local fit of one layer's FFN, with the errors after each."""
    config = state.config
    x, wanted = seen_and_wanted(state, made, index)
    held = state.held.repeat_interleave(made.hidden_in.shape[1])[state.real]
    with torch.no_grad():
        ffn, fate = make_ffn(block_of(state, made, x, wanted), state.base)
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
    return ffn, fate, record


def build_layer(state: Walk, made: LayerPass, index: int) -> tuple[LayerFate | None, dict[str, Any]]:
    """Make the student's layer `index` to do what the teacher's pass `made` does; returns its fate and a record of the errors."""
    carrier = state.carrier
    ffn, fate, record = build_ffn(state, made, index)
    put_ffn(carrier.ffn(index), carrier.card, ffn)
    del ffn
    give_back()
    if "layer" in state.steps and state.config.layer_steps and bool(state.held.any()):
        record |= _fit_record("layer", fit_layer(state, made, index))
    record["error"] = float(layer_error(state, made, index, torch.ones_like(state.held)))
    return fate, {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}


def _fit_record(name: str, done: Fit) -> dict[str, Any]:
    return {f"{name}_before": done.before, f"{name}_after": done.after, f"{name}_best_step": done.best_step}


@torch.no_grad()
def layer_error(state: Walk, made: LayerPass, index: int, blocks: Tensor) -> float:
    """|student's layer output - teacher's|^2 over the change that the teacher's layer makes, on the real tokens of `blocks` [N] bool."""
    carrier, missed, size = state.carrier, 0.0, 0.0
    real = state.real.view(made.hidden_in.shape[:2])
    for rows in carrier.chunks():
        picked = torch.arange(rows.start, rows.stop)[blocks[rows]]
        if len(picked) == 0:
            continue
        got = carrier.call(index, state.hidden[picked], picked)
        weight = real[picked].unsqueeze(-1)
        missed += float(((got - made.hidden_out[picked]).pow(2) * weight).sum())
        size += float(((made.hidden_out[picked] - made.hidden_in[picked]).pow(2) * weight).sum())
    return missed / max(size, 1e-30) if size else math.nan


def fit_layer(state: Walk, made: LayerPass, index: int) -> Fit:
    """Train the whole decoder layer (attention and norms too) towards what the teacher's layer returns on the student's own hidden states."""
    carrier, config = state.carrier, state.config
    layer = carrier.body.layers[index]
    rows = torch.nonzero(~state.held).flatten()
    real = state.real.view(made.hidden_in.shape[:2])
    scale = (made.hidden_out - made.hidden_in).pow(2).mean().clamp_min(1e-30)

    def loss(pick: Tensor) -> Tensor:
        blocks = rows[pick]
        missed = (carrier.call(index, state.hidden[blocks], blocks) - made.hidden_out[blocks]).pow(2)
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
