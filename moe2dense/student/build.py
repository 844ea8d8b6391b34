"""build_student: one walk beside the teacher, in which the student's layers are made, fitted and run, one after the other."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe2dense.config import WalkConfig
from moe2dense.errors import UserError
from moe2dense.student.assemble import copy_tensors, empty_student, put_ffn
from moe2dense.student.carry import Carrier
from moe2dense.student.ffn.local import Fit, fit, local, relative_error
from moe2dense.student.ffn.refit import refit
from moe2dense.student.methods import Block, make_ffn, parse_method, pool_limit
from moe2dense.student.polish import polish
from moe2dense.student.prune import Cut, cut_for, mean_gate, norm_factor, scale_norms
from moe2dense.student.resume import LayerStore
from moe2dense.student.sibling import pretrained_sibling
from moe2dense.student.single import dense_target, single_expert
from moe2dense.student.target import Target, resolve_target
from moe2dense.student.types import LayerFate, Student, dense
from moe2dense.teacher.capture import Observer, RoutingStats
from moe2dense.teacher.load import Teacher, masks
from moe2dense.teacher.stream import LayerPass

if TYPE_CHECKING:
    from moe2dense.data import Blocks

# N blocks, S block length, T = N * S tokens, H hidden, E experts, M student FFN width
Progress = Callable[..., None]


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
    cut: Cut | None = None  # channels and layers that a pruned student keeps
    fate: list[LayerFate | None] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def build_student(
    teacher: Teacher,
    to: str | Target,
    data: "Blocks",
    init: str = "walk",
    out: str | Path | None = None,
    config: WalkConfig | None = None,
    seed: int = 0,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
) -> Student:
    """A dense student of the shape `to`, made from the teacher's weights and what it does on the blocks `data`.

    init: `walk`, or a method with steps, such as `concat`, `obs+refit` or `obs+refit+local` (moe2dense.student.methods).
    out: folder in which finished layers are kept, so that a walk that was interrupted continues at the last one.
    A target that is a pretrained dense checkpoint is returned as it is, without a walk.
    Every layer is fitted to what the teacher's layer returns, given the student's own hidden states so far (error-compensated targets).
    Raises UserError for an unknown method, a student that the teacher's tensors cannot fill, or no data.
    """
    config = config or WalkConfig()
    base, steps = parse_method(init)
    if len(data) == 0:
        raise UserError("data has no blocks; the walk needs some text")
    if isinstance(to, Target):
        target = to
    elif teacher.card is None:
        target = dense_target(to, teacher.config)
    else:
        target = resolve_target(to, teacher.config, teacher.card)
    if target.checkpoint:
        return pretrained_sibling(target, teacher)
    model = empty_student(target)
    cut = cut_for(target.geometry, teacher, data, len(teacher.body.layers))
    copy_tensors(model, target, teacher, cut)
    mask, positions = masks(teacher, data.input_ids, data.attention_mask, data.document_ids)
    carrier = Carrier(model, target.card, data.input_ids, mask, positions)
    stats = RoutingStats(neurons=True)
    real = torch.ones_like(data.input_ids) if data.attention_mask is None else data.attention_mask
    state = Walk(
        teacher, carrier, target, base, steps, config, seed,
        held_out(len(data), config.hold_out, seed), real.reshape(-1).bool(), stats, carrier.embed(), cut,
    )  # fmt: skip
    store = LayerStore(out, data, init, config, seed, target) if out else None
    stream = teacher.stream(data.input_ids, data.attention_mask, data.document_ids, observers=[stats, *observers])
    for observer in observers:
        observer.begin(teacher, data.tokens)
    total, last = len(carrier.body.layers), 1.0
    for made in map(on_cpu, stream):
        if teacher.card is None:
            made = single_expert(made, stats)
        if cut:
            last = norm_factor(made.hidden_out, cut.keep, made.token_mask)
            if made.index not in cut.layers:
                continue  # the next layer's target makes up for it
        record = _layer(state, cut.layer(made) if cut else made, store)
        if progress:
            progress("walk", len(state.fate), total, **{k: v for k, v in record.items() if k != "layer"})
    for observer in observers:
        observer.end()
    if cut:
        scale_norms(carrier.final_norms(), len(cut.keep), last)
    if "polish" in steps and config.polish_epochs > 0:
        assert stream.hidden_states is not None
        state.history.append(
            polish(model, teacher, carrier, stream.hidden_states.to("cpu", torch.float32), state, progress)
        )
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    assert not missing, f"the student's tensor {missing[0]} was neither copied nor built"
    model.requires_grad_(True)
    return Student(model, target.card, state.fate, str(teacher.path), init, data.tokens, state.history)


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


def _layer(state: Walk, made: LayerPass, store: LayerStore | None) -> dict[str, Any]:
    """Make the student's layer, run the student's hidden states through it, and say how well it does."""
    begun, index, carrier = time.monotonic(), len(state.fate), state.carrier
    kept = store.read(index, carrier.body.layers[index]) if store else None
    if kept is None:
        fate, record = _build(state, made)
        record["seconds"] = round(time.monotonic() - begun, 2)
        if store:
            store.write(index, carrier.body.layers[index], fate, record)
    else:
        fate, record = kept
    state.hidden = carrier.run(index, state.hidden)
    state.fate.append(fate)
    state.history.append(record)
    return record


def block_of(state: Walk, made: LayerPass, x: Tensor, target: Tensor) -> Block:
    """What the methods are told of a layer."""
    fixed = [] if made.sparse else [dense(made.dense)]
    probability = None
    if made.sparse:
        fixed = [dense(part.weights, mean_gate(part.gate, made)) for part in made.shared]
        assert made.router_logits is not None
        probability = made.router_logits[made.token_mask].float().softmax(-1).sum(0)
    gating = fixed[0].gating if fixed else made.experts[0].gating if made.experts else None
    block = Block(
        width=state.target.width, hidden_size=x.shape[1], x=x, target=target, fixed=fixed,
        experts=made.experts or (), stats=state.stats[made.index] if made.sparse else None, probability=probability,
        input_scaled=bool(state.teacher.card and state.teacher.card.input_scaled),
        seed=state.seed * 1000 + made.index, std=getattr(state.target.config, "initializer_range", 0.02), config=state.config,
        pool_limit=pool_limit(state.teacher.budget // 2, state.target.width),
    )  # fmt: skip
    return replace(block, gating=gating) if gating else block


def _build(state: Walk, made: LayerPass) -> tuple[LayerFate | None, dict[str, Any]]:
    """Method, refit, local fit and layer fit of one layer, in this order; every step that fits keeps the better of before and after."""
    carrier, index, config = state.carrier, len(state.fate), state.config
    if state.cut:
        scale_norms(carrier.body.layers[index], len(state.cut.keep), made.__dict__["norm_factor"])
    entered, rest = carrier.before_ffn(index, state.hidden)
    real, shape = state.real, made.hidden_in.shape
    x = entered.reshape(-1, shape[2])[real]
    if carrier.card.join == "post_norm":
        wanted = made.y[real]  # what is normed afterwards; the layer fit works through the norm
    else:
        wanted = (made.hidden_out - rest).reshape(-1, shape[2])[real] / carrier.multiplier()
    held = state.held.repeat_interleave(shape[1])[real]
    with torch.no_grad():
        block = block_of(state, made, x, wanted)
        ffn, fate = make_ffn(block, state.base)
        record: dict[str, Any] = {"layer": index, "error_init": relative_error(ffn, x, wanted)}
        if "refit" in state.steps:
            ffn = refit(ffn, x, wanted, config.ridge)
            record["error_refit"] = relative_error(ffn, x, wanted)
    if "local" in state.steps and bool(held.any()):
        ffn, done = local(
            ffn, x, wanted, held, config.local_steps, config.local_lr, config.local_batch, state.seed + index
        )
        record |= _fit_record("local", done)
    put_ffn(carrier.ffn(index), carrier.card, ffn)
    if "layer" in state.steps and config.layer_steps and bool(state.held.any()):
        record |= _fit_record("layer", fit_layer(state, made, index))
    record["error"] = float(_layer_error(state, made, index, torch.ones_like(state.held)))
    return fate, {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}


def _fit_record(name: str, done: Fit) -> dict[str, Any]:
    return {f"{name}_before": done.before, f"{name}_after": done.after, f"{name}_best_step": done.best_step}


@torch.no_grad()
def _layer_error(state: Walk, made: LayerPass, index: int, blocks: Tensor) -> float:
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
        return _layer_error(state, made, index, state.held)

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
