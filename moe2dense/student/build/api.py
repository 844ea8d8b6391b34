"""Build a student beside a teacher: its layers are made, fitted and run, one after the other.

With a folder to keep them in, finished layers are written there and freed, so that memory holds one of the student's layers
at a time.

Several processes that have joined build together: each streams its share of the blocks through the teacher and through the student's
layers, statistics and gradients are summed, and every one ends with the same student. The first one writes.

A student is built in torch's default precision, float32.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe2dense.common.devices import CPU, fast_products
from moe2dense.common.processes import alone, from_first, my_share, world
from moe2dense.common.units import show_bytes
from moe2dense.config.schema import BuildConfig
from moe2dense.config.training import TrainConfig
from moe2dense.errors import UserError
from moe2dense.modeling import internals
from moe2dense.modeling.hooks import feature_name
from moe2dense.student.build.assemble import CopiedTensors, empty_student, fill_constants, unload
from moe2dense.student.build.heal import heal
from moe2dense.student.build.heal_memory import heal_room, heal_settings, least_heal_bytes
from moe2dense.student.build.layer import build_layer, choose_held_out
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.layer_store import LayerStore
from moe2dense.student.build.sibling import pretrained_sibling
from moe2dense.student.build.state import Progress, StudentBuild
from moe2dense.student.build.sweeps import sweep
from moe2dense.student.dense_teacher import dense_target, single_expert
from moe2dense.student.ffn.methods import parse_method
from moe2dense.student.fit_defaults import heal_passes, settle_fits
from moe2dense.student.footprint import FP32, STATE_COPIES, hint_layers
from moe2dense.student.init_spec import steps_of
from moe2dense.student.memory import eager_release, release_freed_memory
from moe2dense.student.prune.cut import cut_for
from moe2dense.student.prune.norms import NormFactors, norm_factors, scale_norms
from moe2dense.student.store import save_parts, save_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.host_check import check_host
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.student.types import Student
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.model import Teacher, masks
from moe2dense.teacher.observer import Observer
from moe2dense.teacher.routing import RoutingStats, reduce_layer

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
    """Build a dense student of the shape `to` from the teacher's weights and from what it computes on the blocks `data`.

    init: `layerwise`, or a method with steps such as `concat`, `obs+refit` or `obs+refit+local` (student/ffn/methods.py).
    out: folder of finished layers, so that an interrupted build continues at the last one.
    observers see the layers of the teacher as they pass.
    A target that is a pretrained dense checkpoint is returned as it is, without a build, unless `config.graft` is set.
    Every layer is fitted to what the teacher's layer returns, given the student's own hidden states so far.
    Processes that have joined must all call it; observers see the blocks of their own process.
    Raises UserError for an unknown method, a student that the teacher's tensors cannot fill, or no data.
    """
    config = _settled(config)
    target = _resolve(teacher, to, data, init, config)
    if _is_shared(target, data):
        state = _build(teacher, target, data, init, out, config, seed, observers, progress)
        return _finish_in_memory(state, init, data, progress)
    with alone():
        if target.checkpoint:
            return pretrained_sibling(target, teacher, data, init, config, seed, progress)
        state = _build(teacher, target, data, init, None, config, seed, observers, progress)
        return _finish_in_memory(state, init, data, progress)


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
    """Build a student as `build_student` does and write it to `folder` (see `store.load_student`).

    The student is in memory as a whole only while it is healed.
    """
    config = _settled(config)
    target = _resolve(teacher, to, data, init, config)
    if not _is_shared(target, data) and world()[1] > 1:
        return from_first(lambda: build_to_folder(teacher, target, data, folder, out, init, config, seed, progress))
    if target.checkpoint:
        return save_student(pretrained_sibling(target, teacher, data, init, config, seed, progress), folder)
    state = _build(teacher, target, data, init, out, config, seed, (), progress)
    if _will_heal(state):
        healed = _finish_in_memory(state, init, data, progress)
        return from_first(lambda: save_student(healed, folder))
    state.history += _unhealed(state)
    student = Student(
        state.runner.model, target.card, state.provenance, str(teacher.path), init, data.tokens, state.history
    )
    store = state.store
    assert store is not None
    return from_first(lambda: save_parts(student, folder, _tensors_by_part(state, store)))


def _is_shared(target: Target, data: "Blocks") -> bool:
    """Return whether processes share a build: not one of a pretrained checkpoint, nor one with fewer blocks than processes."""
    return not target.checkpoint and len(data) >= world()[1]


def _settled(config: BuildConfig | None) -> BuildConfig:
    """Return the settings of a build with which no training is known to follow."""
    config = config or BuildConfig()
    return replace(config, heal_epochs=heal_passes(config.heal_epochs, trained=False))


def heals(steps: Sequence[str], config: BuildConfig) -> bool:
    """Return whether the student is fitted end to end once its layers are built."""
    return "heal" in steps and config.heal_epochs > 0


def _resolve(teacher: Teacher, to: str | Target, data: "Blocks", init: str, config: BuildConfig) -> Target:
    """Check the arguments of a build and return its target."""
    parse_method(init)
    if config.sweeps < 1:
        raise UserError(f"build.sweeps must be at least 1, the build itself; found {config.sweeps}")
    if len(data) == 0:
        raise UserError("data has no blocks; the build needs some text")
    if isinstance(to, Target):
        return to
    if teacher.card is None:
        return dense_target(to, teacher.config)
    target = resolve_target(to, teacher.config, teacher.card, config.prune, config.host)
    if not target.checkpoint:
        check_host(teacher.config, teacher.card, target.card)
    return target


def _heal_room(teacher: Teacher) -> int:
    """Return the bytes that the end-to-end fit may take."""
    return heal_room(teacher.budget, teacher.plan.total_bytes if teacher.resident else 0, teacher.device != CPU)


def _healing(state: StudentBuild) -> TrainConfig | None:
    """Return how the end-to-end fit makes its steps; None where it does not fit. The same on every process."""
    block, on_gpu, processes = state.runner.ids.shape[1], state.teacher.device != CPU, world()[1]
    room, masks = from_first(lambda: (_heal_room(state.teacher), state.runner.mask_use()))
    return heal_settings(state.config, state.target, block, room, on_gpu, processes, masks)


def _will_heal(state: StudentBuild) -> bool:
    return heals(state.steps, state.config) and _healing(state) is not None


def _hinted_layers(state: StudentBuild) -> Sequence[int]:
    """Return the student's layers whose teacher states the heal follows."""
    if not (_will_heal(state) and state.config.heal_hints):
        return ()
    layers = len(state.runner.body.layers)
    return from_first(lambda: hint_layers(layers, 2 * state.hidden.numel(), state.teacher.ram // 4))


def _unhealed(state: StudentBuild) -> list[dict[str, Any]]:
    """Return a record of why the end-to-end fit was left out; empty where it was not asked for."""
    if not heals(state.steps, state.config):
        return []
    option = "--memory" if state.teacher.device.type == "cpu" else "--gpu-memory"
    block, on_gpu = state.runner.ids.shape[1], state.teacher.device != CPU
    need = show_bytes(least_heal_bytes(state.config, state.target, block, on_gpu, state.runner.mask_use()))
    have = show_bytes(_heal_room(state.teacher))
    return [{"heal_skipped": f"training the student end to end takes at least {need}, {option} is {have}"}]


def _start(
    teacher: Teacher, target: Target, data: "Blocks", init: str, out: str | Path | None, config: BuildConfig, seed: int
) -> StudentBuild:
    """Prepare everything before the first layer: the empty student, what it copies of the teacher, its embedded tokens."""
    cut = from_first(lambda: cut_for(target, teacher, data, config.depth))
    share = my_share(len(data))
    own = data[share]
    if cut and len(cut.layers) < len(teacher.body.layers):
        sizes = dense_config(teacher.config.get_text_config(), target.card, target.width, cut.layers, **target.geometry)
        target = replace(target, config=sizes)
    model = empty_student(target, teacher.device)
    copied = CopiedTensors(model, target, teacher, cut, teacher.device)
    copied.fill(lambda name: not copied.in_layer(name) and not name.startswith("lm_head."))
    internals.move_unsaved_buffers(model, teacher.device)
    # an embedding may scale by a buffer: that stays with its table
    internals.move_unsaved_buffers(internals.decoder(model)[1].embed_tokens, CPU)
    mask, positions = masks(teacher, own.input_ids, own.attention_mask, own.document_ids)
    states = teacher.plan.states_device(STATE_COPIES * FP32 * target.config.hidden_size * own.input_ids.numel())
    runner = LayerRunner(model, target.card, own.input_ids, mask, positions, teacher.device, states)
    base, steps = parse_method(init)
    real = torch.ones_like(own.input_ids) if own.attention_mask is None else own.attention_mask
    held_out = choose_held_out(len(data), config.hold_out, seed)[share]
    state = StudentBuild(
        teacher, runner, target, base, steps, config, seed, held_out, real.reshape(-1).bool(),
        RoutingStats(neurons=True), runner.embed(), from_first(lambda: teacher.plan.build_bytes), copied=copied, cut=cut,
    )  # fmt: skip
    healed = _will_heal(state)
    state.steps = steps_of(init, healed, target.card.join)
    state.config = settle_fits(config, state.hidden.shape[-1], len(runner.body.layers), data.tokens, healed)
    if out:
        state.store = LayerStore(out, teacher, data, init, config, seed, target)
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
) -> StudentBuild:
    """Build every layer. Afterwards the layers of a build with a store are on disk and not in memory."""
    state = _start(teacher, target, data, init, out, config, seed)
    own = data[my_share(len(data))]
    with eager_release(_healing(state) is None), fast_products():
        _build_layers(state, own, observers, progress)
        for number in range(2, config.sweeps + 1):
            sweep(state, own, number, progress)
    return state


def _build_layers(
    state: StudentBuild, data: "Blocks", observers: Sequence[Observer], progress: Progress | None
) -> None:
    """Build a student's layer for each layer of the teacher that stays, as the teacher's layers pass."""
    teacher, stats, cut = state.teacher, state.stats, state.cut
    final_factors: NormFactors | None = None
    stream = teacher.stream(
        data.input_ids, data.attention_mask, data.document_ids, observers=[stats, *observers], keep_experts=True
    )
    for observer in observers:
        observer.begin(teacher, data.tokens)
    for layer_pass in stream:
        if teacher.card is None:
            layer_pass = single_expert(layer_pass, stats)
        if cut and not cut.keeps_all_channels(layer_pass):
            final_factors = norm_factors(layer_pass.hidden_out, cut.keep, layer_pass.token_mask)
        if layer_pass.sparse:
            reduce_layer(stats[layer_pass.index])
        if cut and layer_pass.index not in cut.layers:
            continue  # the target of the next layer makes up for it
        record = _next_layer(state, layer_pass)
        if progress:
            numbers = {k: v for k, v in record.items() if k != "layer"}
            progress("build", len(state.provenance), len(state.runner.body.layers), **numbers)
    for observer in observers:
        observer.end()
    if cut and final_factors:
        scale_norms(state.runner.final_norms(), len(cut.keep), final_factors)
    state.hidden = torch.empty(0)
    if _will_heal(state) and stream.hidden_states is not None:
        state.teacher_final = stream.hidden_states.to(CPU, torch.get_default_dtype())


def _next_layer(state: StudentBuild, layer_pass: LayerPass) -> dict[str, Any]:
    """Make the student's next layer, run its hidden states through it, and write it where there is a store."""
    begun, index, runner, cut = time.monotonic(), len(state.provenance), state.runner, state.cut
    layer = runner.body.layers[index]
    release_freed_memory()
    stored = state.store.read(index, layer, runner.device) if state.store else None
    seen = cut.layer(layer_pass) if cut else layer_pass
    if stored is None:
        state.copied.fill(lambda name: state.copied.in_layer(name, index))
        fill_constants(layer, runner.card, runner.device)
        if cut:
            cut.scale_norms(layer, layer_pass)
        provenance, record = build_layer(state, seen, index)
        record["seconds"] = round(time.monotonic() - begun, 2)
        if state.store:
            state.store.write(index, layer, provenance, record)
    else:
        provenance, record = stored
    if index in _hinted_layers(state):
        state.hints[feature_name(index)] = seen.hidden_out.to(CPU, torch.bfloat16)
    state.hidden = runner.run(index, state.hidden)
    if state.store:
        unload(layer)
    else:
        layer.to(CPU)
    release_freed_memory()
    state.begin_where(record)
    state.provenance.append(provenance)
    state.history.append(record)
    return record


def _finish_in_memory(state: StudentBuild, init: str, data: "Blocks", progress: Progress | None) -> Student:
    """Return the student with all its layers in memory, healed where that is asked for and fits."""
    model, layers = state.runner.model, state.runner.body.layers
    if state.store:
        for index, layer in enumerate(layers):
            state.store.read(index, layer)
    state.copied.fill_missing()
    model.tie_weights()
    nn.Module.to(model, CPU)
    healing = _healing(state)
    if state.teacher_final is not None and healing is not None:
        state.history.append(heal(model, state, state.teacher_final, state.hints, healing, progress))
    else:
        state.history += _unhealed(state)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    assert not missing, f"the student's tensor {missing[0]} was neither copied nor built"
    model.requires_grad_(True)
    card, path = state.target.card, str(state.teacher.path)
    return Student(model, card, state.provenance, path, init, data.tokens, state.history)


def _tensors_by_part(state: StudentBuild, store: LayerStore) -> Iterator[dict[str, Tensor]]:
    """Yield the finished student's tensors by name: those outside the layers, then layer by layer, each freed afterwards."""
    model, prefix = state.runner.model, state.copied.layers_prefix
    state.copied.fill_missing()
    yield state.copied.outside_layers()
    unload(model)
    for index, layer in enumerate(state.runner.body.layers):
        store.read(index, layer)
        yield {f"{prefix}{index}.{name}": value for name, value in layer.state_dict().items()}
        unload(layer)
