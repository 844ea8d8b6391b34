"""build_student: one walk beside the teacher, in which the student's layers are made, fitted and run, one after the other.

With a folder to keep them in, finished layers are written there and given back, so that memory holds one of the student's layers at a time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe2dense.config import WalkConfig
from moe2dense.errors import UserError
from moe2dense.losses.capture import feature_name
from moe2dense.student.assemble import CarriedOver, empty_student, unload
from moe2dense.student.carry import Carrier
from moe2dense.student.footprint import hint_layers, polish_bytes
from moe2dense.student.heap import closely, give_back
from moe2dense.student.host import dense_config
from moe2dense.student.layerwise import Walk, build_layer
from moe2dense.student.methods import parse_method
from moe2dense.student.polish import polish
from moe2dense.student.prune import Cut, cut_for, norm_factor, scale_norms
from moe2dense.student.resume import LayerStore
from moe2dense.student.sibling import pretrained_sibling
from moe2dense.student.single import dense_target, single_expert
from moe2dense.student.steps import local_steps, steps_of
from moe2dense.student.store import save_parts, save_student
from moe2dense.student.sweeps import sweep
from moe2dense.student.target import Target, resolve_target
from moe2dense.student.types import Student
from moe2dense.teacher.capture import Observer, RoutingStats
from moe2dense.teacher.load import Teacher, masks
from moe2dense.teacher.stream import LayerPass
from moe2dense.units import show_bytes

if TYPE_CHECKING:
    from moe2dense.data import Blocks

# N blocks, S block length, T = N * S tokens, H hidden, E experts, M student FFN width
Progress = Callable[..., None]


@dataclass
class Building(Walk):
    """A walk that makes a whole student."""

    carried: CarriedOver = field(kw_only=True)
    cut: Cut | None = None  # channels, layers and heads that a pruned student keeps
    store: LayerStore | None = None  # where finished layers go
    final: Tensor | None = None  # [N, S, H] the teacher's final hidden states
    hints: dict[str, Tensor] = field(default_factory=dict)  # [N, S, H] bf16: the teacher's states by a student's layer


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
    A target that is a pretrained dense checkpoint is returned as it is, without a walk (with `graft`, see moe2dense.student.graft).
    Every layer is fitted to what the teacher's layer returns, given the student's own hidden states so far (error-compensated targets).
    Raises UserError for an unknown method, a student that the teacher's tensors cannot fill, or no data.
    """
    config = config or WalkConfig()
    target = _target_of(teacher, to, data, init, config)
    if target.checkpoint:
        return pretrained_sibling(target, teacher, data, init, config, seed, progress)
    state = _walk(teacher, target, data, init, out, config, seed, observers, progress)
    return _whole(state, init, data, progress)


def build_to_folder(
    teacher: Teacher,
    to: str | Target,
    data: "Blocks",
    folder: str | Path,
    out: str | Path,
    init: str = "walk",
    config: WalkConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """As `build_student`, written to `folder` (see `store.load_student`); the student is in memory as a whole only while it is polished."""
    config = config or WalkConfig()
    target = _target_of(teacher, to, data, init, config)
    if target.checkpoint:
        return save_student(pretrained_sibling(target, teacher, data, init, config, seed, progress), folder)
    state = _walk(teacher, target, data, init, out, config, seed, (), progress)
    if polishes(state.steps, config) and _fits(state):
        return save_student(_whole(state, init, data, progress), folder)
    state.history += _unpolished(state)
    about = Student(state.carrier.model, target.card, state.fate, str(teacher.path), init, data.tokens, state.history)
    assert state.store is not None
    return save_parts(about, folder, _parts(state))


def polishes(steps: Sequence[str], config: WalkConfig) -> bool:
    """Whether the student is fitted end to end once its layers are built."""
    return "polish" in steps and config.polish_epochs > 0


def _target_of(teacher: Teacher, to: str | Target, data: "Blocks", init: str, config: WalkConfig) -> Target:
    parse_method(init)
    if config.sweeps < 1:
        raise UserError(f"walk.sweeps must be at least 1, the walk itself; found {config.sweeps}")
    if len(data) == 0:
        raise UserError("data has no blocks; the walk needs some text")
    if isinstance(to, Target):
        return to
    if teacher.card is None:
        return dense_target(to, teacher.config)
    return resolve_target(to, teacher.config, teacher.card, config.prune, config.host)


def _fits(state: Building) -> bool:
    return polish_bytes(state.target.parameters) <= state.teacher.budget


def _hinted(state: Building) -> Sequence[int]:
    """The student's layers whose states the polish follows."""
    if not (polishes(state.steps, state.config) and state.config.polish_hints and _fits(state)):
        return ()
    layers = len(state.carrier.body.layers)
    return hint_layers(layers, 2 * state.hidden.numel(), state.teacher.budget // 4)


def _unpolished(state: Building) -> list[dict[str, Any]]:
    """A record that says why the end-to-end fit was left out; empty where it was not asked for."""
    if not polishes(state.steps, state.config):
        return []
    need, have = show_bytes(polish_bytes(state.target.parameters)), show_bytes(state.teacher.budget)
    return [{"polish_skipped": f"training the student end to end takes {need}, --memory is {have}"}]


def _start(
    teacher: Teacher, target: Target, data: "Blocks", init: str, out: str | Path | None, config: WalkConfig, seed: int
) -> Building:
    """Everything before the first layer: the empty student, what it keeps of the teacher, and its embedded tokens."""
    cut = cut_for(target, teacher, data, config.depth)
    if cut and len(cut.layers) < len(teacher.body.layers):
        sizes = dense_config(teacher.config.get_text_config(), target.card, target.width, cut.layers, **target.geometry)
        target = replace(target, config=sizes)
    model = empty_student(target)
    carried = CarriedOver(model, target, teacher, cut)
    carried.fill(lambda name: not carried.in_layer(name) and not name.startswith("lm_head."))
    mask, positions = masks(teacher, data.input_ids, data.attention_mask, data.document_ids)
    carrier = Carrier(model, target.card, data.input_ids, mask, positions)
    base, steps = parse_method(init)
    real = torch.ones_like(data.input_ids) if data.attention_mask is None else data.attention_mask
    state = Building(
        teacher, carrier, target, base, steps, config, seed, held_out(len(data), config.hold_out, seed),
        real.reshape(-1).bool(), RoutingStats(neurons=True), carrier.embed(), carried=carried, cut=cut,
    )  # fmt: skip
    polished = polishes(steps, config) and _fits(state)
    state.steps = steps_of(init, polished, target.card.join)
    state.config = replace(config, local_steps=local_steps(config.local_steps, polished))
    if out:
        state.store = LayerStore(out, data, init, config, seed, target)
        unload(carrier.body.embed_tokens)
    return state


def _walk(
    teacher: Teacher,
    target: Target,
    data: "Blocks",
    init: str,
    out: str | Path | None,
    config: WalkConfig,
    seed: int,
    observers: Sequence[Observer],
    progress: Progress | None,
) -> Building:
    """Build every layer. Afterwards those of a walk with a store are on disk and not in memory."""
    state = _start(teacher, target, data, init, out, config, seed)
    with closely(not _fits(state)):
        _layers(state, data, observers, progress)
        for number in range(2, config.sweeps + 1):
            sweep(state, data, number, progress)
    return state


def _layers(state: Building, data: "Blocks", observers: Sequence[Observer], progress: Progress | None) -> None:
    teacher, stats, cut, last = state.teacher, state.stats, state.cut, 1.0
    stream = teacher.stream(data.input_ids, data.attention_mask, data.document_ids, observers=[stats, *observers])
    for observer in observers:
        observer.begin(teacher, data.tokens)
    for made in map(on_cpu, stream):
        if teacher.card is None:
            made = single_expert(made, stats)
        if cut:
            last = norm_factor(made.hidden_out, cut.keep, made.token_mask)
            if made.index not in cut.layers:
                continue  # the next layer's target makes up for it
        record = _layer(state, made)
        if progress:
            numbers = {k: v for k, v in record.items() if k != "layer"}
            progress("walk", len(state.fate), len(state.carrier.body.layers), **numbers)
    for observer in observers:
        observer.end()
    if cut:
        scale_norms(state.carrier.final_norms(), len(cut.keep), last)
    state.hidden = torch.empty(0)
    if stream.hidden_states is not None and polishes(state.steps, state.config) and _fits(state):
        state.final = stream.hidden_states.to("cpu", torch.float32)


def _whole(state: Building, init: str, data: "Blocks", progress: Progress | None) -> Student:
    """The student with all its layers in memory, polished where that is asked for and fits."""
    model, layers = state.carrier.model, state.carrier.body.layers
    if state.store:
        for index, layer in enumerate(layers):
            state.store.read(index, layer)
    state.carried.fill_missing()
    model.tie_weights()
    if state.final is not None:
        state.history.append(polish(model, state.teacher, state.carrier, state.final, state, progress, state.hints))
    else:
        state.history += _unpolished(state)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    assert not missing, f"the student's tensor {missing[0]} was neither copied nor built"
    model.requires_grad_(True)
    card, path = state.target.card, str(state.teacher.path)
    return Student(model, card, state.fate, path, init, data.tokens, state.history)


def _parts(state: Building) -> Any:
    """The finished student's tensors by name: what lies outside the layers, then layer by layer, each given back afterwards."""
    model, prefix = state.carrier.model, state.carried.layers_prefix
    assert state.store is not None
    state.carried.fill_missing()
    yield state.carried.outside()
    unload(model)
    for index, layer in enumerate(state.carrier.body.layers):
        state.store.read(index, layer)
        yield {f"{prefix}{index}.{name}": value for name, value in layer.state_dict().items()}
        unload(layer)


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


def _layer(state: Building, made: LayerPass) -> dict[str, Any]:
    """Make the student's layer, run the student's hidden states through it, keep it on disk where there is a store."""
    begun, index, carrier, cut = time.monotonic(), len(state.fate), state.carrier, state.cut
    layer = carrier.body.layers[index]
    give_back()
    kept = state.store.read(index, layer) if state.store else None
    if kept is None:
        state.carried.fill(lambda name: state.carried.in_layer(name, index))
        if cut:
            made = cut.layer(made)
            scale_norms(layer, len(cut.keep), made.__dict__.get("norm_factor", 1.0))
        fate, record = build_layer(state, made, index)
        record["seconds"] = round(time.monotonic() - begun, 2)
        if state.store:
            state.store.write(index, layer, fate, record)
    else:
        fate, record = kept
    if index in _hinted(state):
        state.hints[feature_name(index)] = (cut.layer(made) if cut else made).hidden_out.to(torch.bfloat16)
    state.hidden = carrier.run(index, state.hidden)
    if state.store:
        unload(layer)
    give_back()
    state.fate.append(fate)
    state.history.append(record)
    return record
