"""Plan the most memory of each stage, beside what the program itself takes."""

import math
from dataclasses import dataclass
from typing import Any

from moe2dense.common.units import show_bytes
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.planned_stages import Sizes
from moe2dense.distillation.cost import stored_states
from moe2dense.distillation.rehearsal import rehearse
from moe2dense.evaluation.token_metrics import CHUNK
from moe2dense.families.machines import CPU
from moe2dense.modeling.mask_memory import MaskUse, mask_bytes
from moe2dense.optimizers.footprint import standing_bytes
from moe2dense.optimizers.memory_ladder import changed, in_words, rungs
from moe2dense.student.build.cost import build_bytes
from moe2dense.student.build.heal_memory import heal_bytes, heal_changes
from moe2dense.teacher.cost import HIDDEN_COPIES, recording_batch, resident_bytes, resident_layer_bytes

_FLOAT = 4
_SHARE_TO_USE = 0.94  # of a device: its driver and fragments take the rest
_SCORE_COPIES = 6  # of a chunk of logits, while it is scored
_JUDGED_BLOCKS = 8  # that a student runs at once where it is judged


@dataclass(frozen=True)
class TrainingFit:
    """How training fits: what of its settings is changed for that, the bytes it takes, and both in a sentence."""

    changes: dict[str, Any]
    bytes: int
    said: str = ""
    fits: bool = True


def stage_memory(sizes: Sizes, training: TrainingFit | None) -> dict[str, float]:
    """Return the bytes of every stage."""
    healing = (
        heal_bytes(sizes.heal, sizes.target, sizes.length, sizes.machine.device != CPU, sizes.masks)
        if sizes.heal
        else 0
    )
    build_tokens = sizes.build * sizes.length
    build = float(build_bytes(sizes.config, sizes.shape, sizes.target, build_tokens, sizes.budget, sizes.heal, healing))
    streaming = _streaming(sizes, max(sizes.held_out, 1))
    trained = float(training.bytes) if training else 0.0
    return {
        "build": build,
        "build-control": build,
        "write": _streaming(sizes, min(sizes.wrote, sizes.config.write.shard)),
        "targets": _answering(sizes),
        "train-student": trained,
        "train-control": trained,
        "evaluate": max(streaming, _judging(sizes)),
        "transfer": streaming + 2 * sizes.student,
        "samples": _streaming(sizes, 1) + sizes.student,
        "skills": _streaming(sizes, 1) + sizes.student,
        "export": 2.5 * sizes.student,
    }


def _streaming(sizes: Sizes, blocks: int) -> float:
    """Return the bytes of the teacher's pass over so many blocks, or over what shares a reading."""
    itemsize = _FLOAT if sizes.machine.device == CPU else 2
    weights = resident_bytes(sizes.shape, itemsize) if sizes.resident else resident_layer_bytes(sizes.shape)
    tokens = min(sizes.batch, blocks * sizes.length)
    states = tokens * itemsize * HIDDEN_COPIES * sizes.shape.hidden_size
    return weights + (states if sizes.machine.device == CPU else min(states, max(0, sizes.budget - weights)))


def _answering(sizes: Sizes) -> float:
    """Return the bytes of a pass that records states of layers for targets; a GPU leaves those to main memory."""
    states = stored_states(sizes.config, sizes.target)
    batch = recording_batch(sizes.batch, states) if sizes.resident else sizes.batch
    tokens = min(batch, sizes.blocks * sizes.length)
    recorded = 0 if sizes.machine.device != CPU else states + bool(states)
    return _streaming(sizes, math.ceil(tokens / sizes.length)) + recorded * tokens * _FLOAT * sizes.shape.hidden_size


def _judging(sizes: Sizes) -> float:
    """Return the bytes of scoring a student: itself, the teacher's answers and head, a chunk of both distributions."""
    shape, target = sizes.shape, sizes.target.config
    answers = sizes.texts * sizes.held_out * sizes.length * shape.hidden_size * _FLOAT
    head = shape.vocab_size * shape.hidden_size * _FLOAT
    passing = _JUDGED_BLOCKS * sizes.length * (4 * target.hidden_size + 3 * sizes.target.width) * _FLOAT
    return sizes.student + answers + head + max(passing, _SCORE_COPIES * CHUNK * _FLOAT)


def fit_training(sizes: Sizes) -> TrainingFit:
    """Return how training fits the machine, by rehearsals of a step at full size.

    The first change that makes it fit is taken; none where it fits as it is set, or where train.fit_memory is off.
    """
    config, room = sizes.config.train, _SHARE_TO_USE * sizes.machine.memory
    least: TrainingFit | None = None
    for changes in rungs(config, sizes.length, sizes.machine.device != CPU):
        need = _standing(sizes, changed(config, changes))
        if need <= room or not config.fit_memory:  # else no step has to be rehearsed
            need = _rehearsed(sizes, changed(config, changes))
        fit = TrainingFit(changes, need, _sentence(sizes, changes, need), need <= room)
        if fit.fits or not config.fit_memory:
            return fit
        least = fit if least is None or need < least.bytes else least
    assert least is not None, "the first change is none"
    return TrainingFit({}, least.bytes, "", fits=False)


def _standing(sizes: Sizes, config: TrainConfig) -> int:
    """Return the bytes that training holds on its device between steps, at least."""
    trained = sizes.body.trained if config.lora else sizes.target.parameters
    return standing_bytes(config, sizes.target.parameters, trained)


def _rehearsed(sizes: Sizes, config: TrainConfig) -> int:
    """Return the bytes that training holds on its device."""
    target, half = sizes.target, sizes.machine.device != CPU
    matched = stored_states(sizes.config, target)
    peak = rehearse(target.config, sizes.shape, config, sizes.length, matched, half).peak
    peak += training_mask_bytes(sizes, config)
    # a GPU's backward pass gives each tensor's gradient and copies back; states rest in main memory
    return peak - (3 * _FLOAT * target.parameters if config.offload and half else 0)


def training_mask_bytes(sizes: Sizes, config: TrainConfig, masks: MaskUse | None = None) -> int:
    """Return the bytes of the masks of a training pass; masks: how they are made, where it is not as planned."""
    blocks = min(config.micro_batch, max(1, config.batch // sizes.length))
    itemsize = _FLOAT if sizes.machine.device == CPU else 2
    return mask_bytes(
        sizes.target.config, masks or sizes.masks, blocks, sizes.length, itemsize, again=config.gradient_checkpointing
    )


def healing_sentence(sizes: Sizes) -> str:
    """Say what is changed so that the build's end-to-end fit fits; '' where nothing is."""
    changes = heal_changes(sizes.heal) if sizes.heal is not None else {}
    if sizes.heal is None or not changes:
        return ""
    need = heal_bytes(sizes.heal, sizes.target, sizes.length, sizes.machine.device != CPU, sizes.masks)
    return f"to fit {show_bytes(sizes.budget)}, where it takes {show_bytes(need)}, {in_words(changes, named=False)}"


def _sentence(sizes: Sizes, changes: dict[str, Any], need: int) -> str:
    if not changes:
        return ""
    return f"to fit {show_bytes(sizes.machine.memory)}, where it takes {show_bytes(need)}, {in_words(changes)}"
