"""Sweep again over a built student's layers: each is fitted from where it stands on what the layers before it now give."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe2dense.common.devices import CPU
from moe2dense.common.shared_rows import any_row
from moe2dense.student.build.assemble import present_ffn, put_ffn, unload
from moe2dense.student.build.layer import (
    block_weights,
    ffn_inputs_and_targets,
    fit_ffn,
    fit_layer,
    layer_error,
)
from moe2dense.student.build.layer_store import LayerStore
from moe2dense.student.build.state import BuildState, Progress, StudentBuild
from moe2dense.student.memory import release_freed_memory
from moe2dense.teacher.layer_pass import LayerPass

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks

# N blocks, S block length, H hidden
_SEED_STEP = 7919  # between the seeds of sweeps, so that each sees other batches


def sweep(state: StudentBuild, data: "Blocks", number: int, progress: Progress | None = None) -> None:
    """Run sweep `number` (from 2) over the layers of a built student; the teacher is read again on the same blocks `data`.

    A layer is changed only where its error on the held-out blocks falls. Finished layers go to a folder of their own inside
    that of the build.
    """
    runner, cut, earlier = state.runner, state.cut, state.store
    state.copied.fill_missing("lm_head.")
    state.hidden = runner.embed()
    if earlier:
        state.store = earlier.sweep(number)
        unload(runner.body.embed_tokens)
    index = 0
    for layer_pass in state.teacher.stream(data.input_ids, data.attention_mask, data.document_ids):
        if cut and layer_pass.index not in cut.layers:
            continue
        record = _sweep_layer(state, cut.layer(layer_pass) if cut else layer_pass, index, number, earlier)
        index += 1
        if progress:
            progress("build", index, len(runner.body.layers), error=record["error"])
    state.hidden = torch.empty(0)


def _sweep_layer(
    state: StudentBuild, layer_pass: LayerPass, index: int, number: int, earlier: LayerStore | None
) -> dict[str, Any]:
    """Fit one layer again, or read it from the folder where this sweep has fitted it already; return its record."""
    begun, layer = time.monotonic(), state.runner.body.layers[index]
    release_freed_memory()
    device = state.runner.device
    stored = state.store.read(index, layer, device) if state.store else None
    if stored is None:
        if earlier:
            earlier.read(index, layer, device)
        layer.to(device)
        reseeded = replace(state, seed=state.seed + _SEED_STEP * (number - 1))
        record = {"layer": index, "sweep": number, **fit_again(reseeded, layer_pass, index)}
        record["seconds"] = round(time.monotonic() - begun, 2)
        if state.store:
            state.store.write(index, layer, state.provenance[index], record)
    else:
        record = stored[1]
    state.hidden = state.runner.run(index, state.hidden)
    if state.store:
        unload(layer)
    else:
        layer.to(CPU)
    state.history.append(record)
    return record


def fit_again(state: BuildState, layer_pass: LayerPass, index: int) -> dict[str, float]:
    """Run the local and the layer fit on the student's layer `index`; undo each that does not lower the held-out error.

    Return that error before and after, and the error over all tokens. A host with an MoE wrapper has no FFN of its own to
    fit, so only its layer is fitted.
    """
    runner, config = state.runner, state.config
    everything = torch.ones_like(state.held_out)
    if not any_row(state.held_out):
        return {"error": round(layer_error(state, layer_pass, index, everything), 6)}
    before = layer_error(state, layer_pass, index, state.held_out)
    if "local" in state.steps and not runner.card.moe_shaped:
        gating = layer_pass.experts.gating if layer_pass.experts else layer_pass.dense.gating
        current = present_ffn(runner.ffn(index), runner.card, gating)
        x, target = ffn_inputs_and_targets(state, layer_pass, index)
        weights = block_weights(state, layer_pass).flatten()[state.real_tokens].to(x.device)
        fitted, _ = fit_ffn(state, current, x, target, weights, index)
        put_ffn(runner.ffn(index), runner.card, fitted)
        if not layer_error(state, layer_pass, index, state.held_out) < before:
            put_ffn(runner.ffn(index), runner.card, current)
    if "layer" in state.steps and config.layer_steps:
        fit_layer(state, layer_pass, index)
    errors = {
        "held_out_before": before,
        "held_out_after": layer_error(state, layer_pass, index, state.held_out),
        "error": layer_error(state, layer_pass, index, everything),
    }
    return {k: round(v, 6) for k, v in errors.items()}
