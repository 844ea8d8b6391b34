"""What a conversion would build and cost, from a config and cards alone; no weights are read.

Costs follow the usual counts: 2N FLOPs per token forward, 6N forward and backward (Kaplan et al., 2001.08361), with the
active parameters for N where experts are routed; training from scratch is taken at 20 tokens a parameter (2203.15556).
"""

from itertools import pairwise

from moe2dense.common.devices import CPU, pick_device
from moe2dense.common.devices import free_bytes as free_bytes_of
from moe2dense.common.files import free_bytes
from moe2dense.common.units import show_count
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.conversion.checks import check_architecture
from moe2dense.conversion.configure import default_out, stage_sizes, texts_of_folder
from moe2dense.conversion.machine import calibrate
from moe2dense.conversion.placement import plan_placement
from moe2dense.conversion.plan_warnings import (
    TOKENS_PER_PARAMETER,
    capacity_warning,
    disk_warning,
    host_warning,
    memory_warnings,
    text_warnings,
)
from moe2dense.conversion.results import Machine, Plan
from moe2dense.conversion.teacher_folder import checked_teacher
from moe2dense.distillation.cost import passes, stored_states
from moe2dense.errors import UserError
from moe2dense.modeling.shape import Geometry, teacher_geometry
from moe2dense.student.build.cost import build_bytes, build_tokens, fit_flops, heal_runs
from moe2dense.student.target.host_check import check_host
from moe2dense.student.target.pruned import scored
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.teacher.cost import (
    HIDDEN_COPIES,
    checkpoint_bytes,
    macro_batch_tokens,
    memory_budget,
    resident_layer_bytes,
)

TRAIN_BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and two Adam moments
_EFFICIENCY = 0.6  # of the measured speed that a run reaches


def block_length(config: RunConfig, max_positions: int) -> int:
    """Return the tokens per block: --block, else min(2048, the teacher's max positions).

    Raises UserError beyond what the teacher takes.
    """
    if config.data.block > max_positions:
        raise UserError(f"--block {config.data.block} is more than the teacher's {max_positions} positions")
    return config.data.block or min(2048, max_positions)


def make_plan(config: RunConfig, machine: Machine | None = None) -> Plan:
    """Plan a resolved run; `machine` is what its times are for, this one measured where none is given.

    Raises UserError for a teacher or target that cannot be converted.
    """
    teacher, remarks = checked_teacher(config.model, config.teacher.card)
    shape = teacher_geometry(teacher.config, teacher.card)
    target = resolve_target(config.to, teacher.config, teacher.card, config.build.prune, config.build.host)
    if not target.checkpoint:
        remarks = [*remarks, check_host(teacher.config, teacher.card, target.card)]
    check_architecture(config, target)
    block = block_length(config, shape.max_positions)
    tokens, build = config.train.tokens, build_tokens(config, block, target.width)
    placement = plan_placement(config, shape, target, build, *_computing_device(config, machine))
    machine = machine or calibrate(teacher.path, device=config.teacher.device)
    size = checkpoint_bytes(teacher, shape)
    budget = memory_budget(config.teacher.memory, "--memory")
    batch = macro_batch_tokens(budget, shape)
    build_reads = config.build.sweeps + scored(target.geometry, config.build.depth)
    reads = _parts(build, batch) * build_reads + _parts(max(tokens - build, 0), batch)
    heal = heal_runs(config, target, budget)
    memory = {
        "build": build_bytes(config, shape, target, build, budget),
        "targets": _targets_bytes(shape, min(batch, max(tokens, block))) if tokens else 0,
        "distill": _training_bytes(config, target) if tokens else 0,
        "evaluate": 4 * target.parameters,
    }
    disk = _disk(config, shape, target)
    flops = _flops(config, shape, target, build, heal)
    seconds = {work: flops[work] / (_EFFICIENCY * machine.flops) for work in ("teacher", "build", "student")}
    seconds["reading"] = reads * size / machine.disk
    out = config.out or default_out(teacher.name, config.to)
    warnings = [
        *remarks,
        capacity_warning(shape, target),
        *text_warnings(config, shape, target, tokens, build),
        *memory_warnings(config, target, memory, heal, budget),
        host_warning(target),
        disk_warning(sum(disk.values()), free_bytes(out), out),
    ]
    return Plan(
        teacher=teacher.name,
        source=str(teacher.path or teacher.hub_id),
        shape=shape,
        checkpoint_bytes=size,
        target=target,
        tokens=tokens,
        build_tokens=build,
        passes=passes(config.train, tokens, target.parameters),
        block=block,
        data=config.data.path or DEFAULT_CORPUS,
        out=out,
        memory_budget=budget,
        macro_batch=batch,
        reads=reads,
        break_even_batch=round(size * _EFFICIENCY * machine.flops / (machine.disk * 2 * shape.active_parameters)),
        memory=memory,
        disk=disk,
        flops=flops,
        seconds=seconds,
        machine=machine,
        placement=placement,
        warnings=tuple(filter(None, warnings)),
        depth=config.build.depth,
        ood=config.data.ood,
        folder_texts=texts_of_folder(config, teacher),
    )


def _computing_device(config: RunConfig, machine: Machine | None) -> tuple[str, int]:
    """Return (the device that computes, its free bytes): the one of this machine, a CPU for another machine's numbers."""
    device = CPU if machine is not None else pick_device(config.teacher.device)
    return device.type, free_bytes_of(device) if device.type == "cuda" else 0


def _parts(tokens: int, batch: int) -> int:
    return -(-tokens // batch)


def _targets_bytes(shape: Geometry, batch: int) -> int:
    """Memory of streaming the teacher over a macro-batch: one layer and the hidden states."""
    return resident_layer_bytes(shape) + batch * 4 * HIDDEN_COPIES * shape.hidden_size


def _trained_parameters(config: RunConfig, target: Target) -> int:
    return max(target.parameters // 50, 1) if config.train.lora else target.parameters


def _training_bytes(config: RunConfig, target: Target) -> int:
    """Memory of training: the student's weights, and gradients and moments of what is trained."""
    return 4 * target.parameters + (TRAIN_BYTES_PER_PARAMETER - 4) * _trained_parameters(config, target)


def _disk(config: RunConfig, shape: Geometry, target: Target) -> dict[str, int]:
    """Bytes that each part of a run folder takes."""
    n, tokens = target.parameters, config.train.tokens
    return {
        "build": (1 + config.build.sweeps) * 4 * n,
        "targets": (2 + stored_states(config, target)) * shape.hidden_size * tokens,
        "checkpoints": 2 * (4 * n + 8 * _trained_parameters(config, target)) if tokens else 0,
        "model": 2 * n,
    }


def _flops(config: RunConfig, shape: Geometry, target: Target, build: int, heal: bool) -> dict[str, float]:
    """FLOPs of the teacher's passes, of the build, of the student's training, and of training such a student from scratch."""
    n, tokens = target.parameters, config.train.tokens
    return {
        "teacher": 2.0 * shape.active_parameters * max(tokens, build),
        "build": 2.0 * shape.parameters * build * config.build.sweeps + fit_flops(config, target, build, heal),
        "student": 6.0 * n * tokens * passes(config.train, tokens, n),
        "from_scratch": 6.0 * n * TOKENS_PER_PARAMETER * n,
    }


def stage_targets(settings: RunConfig) -> list[Target]:
    """Return the student of every stage. Raises UserError when one is not smaller than the one before it."""
    teacher, _ = checked_teacher(settings.model, settings.teacher.card)
    targets = [resolve_target(size, teacher.config, teacher.card) for size in stage_sizes(settings.stages)]
    for larger, smaller in pairwise(targets):
        if smaller.checkpoint or larger.checkpoint:
            raise UserError(f"--stages {settings.stages}: a stage is a size or a named target, not a checkpoint")
        if smaller.parameters >= larger.parameters:
            raise UserError(
                f"--stages {settings.stages}: {smaller.to} ({show_count(smaller.parameters)}) is not smaller than "
                f"{larger.to} ({show_count(larger.parameters)}); order them from large to small"
            )
    return targets
