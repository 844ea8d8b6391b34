"""build_student: one build beside the teacher, in which the student's layers are made, fitted and run, one after the other.

With a folder to keep them in, finished layers are written there and given back, so that memory holds one of the student's layers at a time.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe2dense.common.units import show_bytes
from moe2dense.config.schema import BuildConfig
from moe2dense.errors import UserError
from moe2dense.modeling.hooks import feature_name
from moe2dense.student.build.assemble import CarriedOver, empty_student, unload
from moe2dense.student.build.heal import heal
from moe2dense.student.build.layer import build_layer, held_out, on_cpu
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.layer_store import LayerStore
from moe2dense.student.build.sibling import pretrained_sibling
from moe2dense.student.build.state import Building, Progress
from moe2dense.student.build.sweeps import sweep
from moe2dense.student.dense_teacher import dense_target, single_expert
from moe2dense.student.ffn.methods import parse_method
from moe2dense.student.footprint import heal_bytes, hint_layers
from moe2dense.student.init_spec import local_steps, steps_of
from moe2dense.student.memory import eager_release, release_freed_memory
from moe2dense.student.prune.cut import cut_for, norm_factor, scale_norms
from moe2dense.student.store import save_parts, save_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.student.types import Student
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.model import Teacher, masks
from moe2dense.teacher.observer import Observer
from moe2dense.teacher.routing import RoutingStats

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks


def build_student(
    teacher: Teacher,
    to: str | Target,
    data: "Blocks",
    init: str = "layerwise",
    out: str | Path | None = None,
    config: BuildConfig | None = None,
    seed: int = 0,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
) -> Student:
    """A dense student of the shape `to`, made from the teacher's weights and what it does on the blocks `data`.

    init: `layerwise`, or a method with steps, such as `concat`, `obs+refit` or `obs+refit+local` (moe2dense.student.methods).
    out: folder in which finished layers are kept, so that a build that was interrupted continues at the last one.
    A target that is a pretrained dense checkpoint is returned as it is, without a build (with `graft`, see moe2dense.student.graft).
    Every layer is fitted to what the teacher's layer returns, given the student's own hidden states so far (error-compensated targets).
    Raises UserError for an unknown method, a student that the teacher's tensors cannot fill, or no data.
    """
    config = config or BuildConfig()
    target = _target_of(teacher, to, data, init, config)
    if target.checkpoint:
        return pretrained_sibling(target, teacher, data, init, config, seed, progress)
    state = _build(teacher, target, data, init, out, config, seed, observers, progress)
    return _whole(state, init, data, progress)


def build_to_folder(
    teacher: Teacher,
    to: str | Target,
    data: "Blocks",
    folder: str | Path,
    out: str | Path,
    init: str = "layerwise",
    config: BuildConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """As `build_student`, written to `folder` (see `store.load_student`); the student is in memory as a whole only while it is healed."""
    config = config or BuildConfig()
    target = _target_of(teacher, to, data, init, config)
    if target.checkpoint:
        return save_student(pretrained_sibling(target, teacher, data, init, config, seed, progress), folder)
    state = _build(teacher, target, data, init, out, config, seed, (), progress)
    if heals(state.steps, config) and _fits(state):
        return save_student(_whole(state, init, data, progress), folder)
    state.history += _unhealed(state)
    about = Student(
        state.runner.model, target.card, state.provenance, str(teacher.path), init, data.tokens, state.history
    )
    assert state.store is not None
    return save_parts(about, folder, _parts(state))


def heals(steps: Sequence[str], config: BuildConfig) -> bool:
    """Whether the student is fitted end to end once its layers are built."""
    return "heal" in steps and config.heal_epochs > 0


def _target_of(teacher: Teacher, to: str | Target, data: "Blocks", init: str, config: BuildConfig) -> Target:
    parse_method(init)
    if config.sweeps < 1:
        raise UserError(f"build.sweeps must be at least 1, the build itself; found {config.sweeps}")
    if len(data) == 0:
        raise UserError("data has no blocks; the build needs some text")
    if isinstance(to, Target):
        return to
    if teacher.card is None:
        return dense_target(to, teacher.config)
    return resolve_target(to, teacher.config, teacher.card, config.prune, config.host)


def _fits(state: Building) -> bool:
    return heal_bytes(state.target.parameters) <= state.teacher.budget


def _hinted(state: Building) -> Sequence[int]:
    """The student's layers whose states the heal follows."""
    if not (heals(state.steps, state.config) and state.config.heal_hints and _fits(state)):
        return ()
    layers = len(state.runner.body.layers)
    return hint_layers(layers, 2 * state.hidden.numel(), state.teacher.budget // 4)


def _unhealed(state: Building) -> list[dict[str, Any]]:
    """A record that says why the end-to-end fit was left out; empty where it was not asked for."""
    if not heals(state.steps, state.config):
        return []
    need, have = show_bytes(heal_bytes(state.target.parameters)), show_bytes(state.teacher.budget)
    return [{"heal_skipped": f"training the student end to end takes {need}, --memory is {have}"}]


def _start(
    teacher: Teacher, target: Target, data: "Blocks", init: str, out: str | Path | None, config: BuildConfig, seed: int
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
    runner = LayerRunner(model, target.card, data.input_ids, mask, positions)
    base, steps = parse_method(init)
    real = torch.ones_like(data.input_ids) if data.attention_mask is None else data.attention_mask
    state = Building(
        teacher, runner, target, base, steps, config, seed, held_out(len(data), config.hold_out, seed),
        real.reshape(-1).bool(), RoutingStats(neurons=True), runner.embed(), carried=carried, cut=cut,
    )  # fmt: skip
    healed = heals(steps, config) and _fits(state)
    state.steps = steps_of(init, healed, target.card.join)
    state.config = replace(config, local_steps=local_steps(config.local_steps, healed))
    if out:
        state.store = LayerStore(out, data, init, config, seed, target)
        unload(runner.body.embed_tokens)
    return state


def _build(
    teacher: Teacher,
    target: Target,
    data: "Blocks",
    init: str,
    out: str | Path | None,
    config: BuildConfig,
    seed: int,
    observers: Sequence[Observer],
    progress: Progress | None,
) -> Building:
    """Build every layer. Afterwards those of a build with a store are on disk and not in memory."""
    state = _start(teacher, target, data, init, out, config, seed)
    with eager_release(not _fits(state)):
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
            progress("build", len(state.provenance), len(state.runner.body.layers), **numbers)
    for observer in observers:
        observer.end()
    if cut:
        scale_norms(state.runner.final_norms(), len(cut.keep), last)
    state.hidden = torch.empty(0)
    if stream.hidden_states is not None and heals(state.steps, state.config) and _fits(state):
        state.final = stream.hidden_states.to("cpu", torch.float32)


def _whole(state: Building, init: str, data: "Blocks", progress: Progress | None) -> Student:
    """The student with all its layers in memory, healed where that is asked for and fits."""
    model, layers = state.runner.model, state.runner.body.layers
    if state.store:
        for index, layer in enumerate(layers):
            state.store.read(index, layer)
    state.carried.fill_missing()
    model.tie_weights()
    if state.final is not None:
        state.history.append(heal(model, state.teacher, state.runner, state.final, state, progress, state.hints))
    else:
        state.history += _unhealed(state)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    assert not missing, f"the student's tensor {missing[0]} was neither copied nor built"
    model.requires_grad_(True)
    card, path = state.target.card, str(state.teacher.path)
    return Student(model, card, state.provenance, path, init, data.tokens, state.history)


def _parts(state: Building) -> Any:
    """The finished student's tensors by name: what lies outside the layers, then layer by layer, each given back afterwards."""
    model, prefix = state.runner.model, state.carried.layers_prefix
    assert state.store is not None
    state.carried.fill_missing()
    yield state.carried.outside()
    unload(model)
    for index, layer in enumerate(state.runner.body.layers):
        state.store.read(index, layer)
        yield {f"{prefix}{index}.{name}": value for name, value in layer.state_dict().items()}
        unload(layer)


def _layer(state: Building, made: LayerPass) -> dict[str, Any]:
    """Make the student's layer, run the student's hidden states through it, keep it on disk where there is a store."""
    begun, index, runner, cut = time.monotonic(), len(state.provenance), state.runner, state.cut
    layer = runner.body.layers[index]
    release_freed_memory()
    kept = state.store.read(index, layer) if state.store else None
    if kept is None:
        state.carried.fill(lambda name: state.carried.in_layer(name, index))
        if cut:
            made = cut.layer(made)
            scale_norms(layer, len(cut.keep), made.__dict__.get("norm_factor", 1.0))
        provenance, record = build_layer(state, made, index)
        record["seconds"] = round(time.monotonic() - begun, 2)
        if state.store:
            state.store.write(index, layer, provenance, record)
    else:
        provenance, record = kept
    if index in _hinted(state):
        state.hints[feature_name(index)] = (cut.layer(made) if cut else made).hidden_out.to(torch.bfloat16)
    state.hidden = runner.run(index, state.hidden)
    if state.store:
        unload(layer)
    release_freed_memory()
    state.provenance.append(provenance)
    state.history.append(record)
    return record
