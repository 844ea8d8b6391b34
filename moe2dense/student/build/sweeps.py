"""Further sweeps over the student's layers: each is fitted again, from where it stands, on what the layers before it now give."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe2dense.families.cards import StudentCard
from moe2dense.student.build.assemble import put_ffn, unload
from moe2dense.student.build.layer import fit_layer, layer_error, place_for, seen_and_wanted
from moe2dense.student.build.state import BuildState
from moe2dense.student.ffn.dense import DenseFFN, gating_of
from moe2dense.student.ffn.local import local
from moe2dense.student.memory import release_freed_memory
from moe2dense.teacher.layer_pass import LayerPass

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks
    from moe2dense.student.build.layer_store import LayerStore
    from moe2dense.student.build.state import Building, Progress

# N blocks, S block length, H hidden


def sweep(state: "Building", data: "Blocks", number: int, progress: "Progress | None" = None) -> None:
    """Sweep `number` (from 2) over the layers of a built student, beside another reading of the teacher on the same tokens.

    A layer is changed only where its error on the held-out blocks falls. Finished layers go to a folder of their own beside the earlier ones.
    """
    from moe2dense.student.build.layer import on_cpu

    runner, cut, carried, earlier = state.runner, state.cut, state.carried, state.store
    carried.fill_missing("lm_head.")
    state.hidden = runner.embed()
    if earlier:
        state.store = earlier.sweep(number)
        unload(runner.body.embed_tokens)
    index = 0
    for made in map(on_cpu, state.teacher.stream(data.input_ids, data.attention_mask, data.document_ids)):
        if cut and made.index not in cut.layers:
            continue
        record = _layer(state, cut.layer(made) if cut else made, index, number, earlier)
        index += 1
        if progress:
            progress("build", index, len(runner.body.layers), error=record["error"])
    state.hidden = torch.empty(0)


def _layer(state: "Building", made: LayerPass, index: int, number: int, earlier: "LayerStore | None") -> dict[str, Any]:
    """Fit one layer again, or read it where this sweep has been there already."""
    begun, layer = time.monotonic(), state.runner.body.layers[index]
    release_freed_memory()
    kept = state.store.read(index, layer) if state.store else None
    if kept is None:
        if earlier:
            earlier.read(index, layer)
        again = replace(state, seed=state.seed + 7919 * (number - 1))  # other batches than before
        record = {"layer": index, "sweep": number, **fit_again(again, made, index)}
        record["seconds"] = round(time.monotonic() - begun, 2)
        if state.store:
            state.store.write(index, layer, state.provenance[index], record)
    else:
        record = kept[1]
    state.hidden = state.runner.run(index, state.hidden)
    if state.store:
        unload(layer)
    state.history.append(record)
    return record


def present_ffn(module: Any, card: StudentCard, like: Any) -> DenseFFN:
    """A host's FFN as it is, sharing its tensors; `like` is an FFN with the same gated activation."""
    parts = [module.get_submodule(path) for path in (card.gate, card.up, card.down)]
    biases = [None if part.bias is None else part.bias.detach() for part in parts]
    return DenseFFN(*(part.weight.detach() for part in parts), *biases, gating=gating_of(like))


def fit_again(state: BuildState, made: LayerPass, index: int) -> dict[str, float]:
    """The local and the layer fit of `--init` on the student's layer `index` as it is, each undone where the held-out error does not fall.

    Returns that error before and after, and over all tokens. A host with an MoE wrapper has no FFN of its own to fit: only its layer is.
    """
    runner, config = state.runner, state.config
    everything = torch.ones_like(state.held)
    if not bool(state.held.any()):
        return {"error": round(layer_error(state, made, index, everything), 6)}
    before = layer_error(state, made, index, state.held)
    if "local" in state.steps and not runner.card.experts:
        own = present_ffn(runner.ffn(index), runner.card, made.experts[0] if made.experts else made.dense)
        x, wanted = seen_and_wanted(state, made, index)
        held = state.held.repeat_interleave(made.hidden_in.shape[1])[state.real]
        device, steps = place_for(state, own, x), (config.local_steps, config.local_lr, config.local_batch)
        fitted, _ = local(own, x, wanted, held, *steps, state.seed + index, device)
        put_ffn(runner.ffn(index), runner.card, fitted)
        if not layer_error(state, made, index, state.held) < before:
            put_ffn(runner.ffn(index), runner.card, own)
    if "layer" in state.steps and config.layer_steps:
        fit_layer(state, made, index)
    after = layer_error(state, made, index, state.held)
    found = {"held_before": before, "held_after": after, "error": layer_error(state, made, index, everything)}
    return {k: round(v, 6) for k, v in found.items()}
