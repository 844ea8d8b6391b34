"""What a conversion would build and cost, from a config and cards alone; no weights are read.

FLOPs, bytes and memory of each stage are counted as the run counts them (planned_stages, planned_memory); training from
scratch is taken at 20 tokens a parameter (2203.15556) and 6 FLOPs a parameter and token (2001.08361).
"""

from dataclasses import replace
from itertools import pairwise

import torch

from moe2dense.common.devices import free_bytes as free_bytes_of
from moe2dense.common.devices import pick_device
from moe2dense.common.files import free_bytes
from moe2dense.common.units import show_count
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.checks import check_architecture
from moe2dense.conversion.configure import default_out, stage_sizes, texts_of_folder
from moe2dense.conversion.extra_text import extra_text
from moe2dense.conversion.machine import calibrate
from moe2dense.conversion.placement import Placement, plan_placement, with_savings
from moe2dense.conversion.plan_warnings import (
    TOKENS_PER_PARAMETER,
    capacity_warning,
    disk_warning,
    host_warning,
    idle_warning,
    mask_warning,
    memory_warnings,
    precision_warning,
    text_warnings,
)
from moe2dense.conversion.planned_memory import fit_training, healing_sentence, stage_memory
from moe2dense.conversion.planned_stages import Sizes, answers_of, plan_stages
from moe2dense.conversion.results import Plan
from moe2dense.conversion.teacher_folder import checked_teacher
from moe2dense.distillation.adapters import add_adapters
from moe2dense.errors import UserError
from moe2dense.families.fields import config_field
from moe2dense.families.machines import CPU, Machine
from moe2dense.families.resolve import ResolvedTeacher
from moe2dense.modeling.attention import planned_mask_use
from moe2dense.modeling.empty import empty_model
from moe2dense.modeling.products import Products, body_products
from moe2dense.modeling.shape import Geometry, teacher_geometry
from moe2dense.optimizers.memory_ladder import changed
from moe2dense.student.build.cost import build_tokens, heal_asked
from moe2dense.student.build.heal_memory import heal_room, heal_settings
from moe2dense.student.target.host_check import check_host
from moe2dense.student.target.pruned import scored
from moe2dense.student.target.resolve import Target, resolve_target
from moe2dense.teacher.cost import checkpoint_bytes, resident_bytes, split_for


def block_length(config: RunConfig, max_positions: int) -> int:
    """Return the tokens per block: --block, else min(2048, the teacher's max positions).

    Raises UserError beyond what the teacher takes.
    """
    if config.data.block > max_positions:
        raise UserError(f"--block {config.data.block} is more than the teacher's {max_positions} positions")
    return config.data.block or min(2048, max_positions)


def held_out_blocks(wanted: int, block: int, tokens: int) -> int:
    """Return how many held-out blocks are scored: those wanted or, for 0, by the text that the student is made from.

    Scoring is not to cost more than what it scores: 96 blocks, but no more than a quarter of `tokens`, with 24 blocks and
    24,576 tokens as the least.
    """
    return wanted or min(96, max(24, 24_576 // block, tokens // (4 * block)))


def make_plan(config: RunConfig, machine: Machine | None = None) -> Plan:
    """Plan a resolved run; `machine` is what it is for, this one measured where none is given.

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
    own = machine is None
    machine = machine or calibrate(teacher.path, device=config.teacher.device)
    placement = plan_placement(config, shape, target, build, machine.device, *_free_memory(config, machine, own))
    budget = placement.gpu_memory or placement.memory
    sizes = _sizes(config, teacher, shape, target, machine, placement, block, build)
    if heal_asked(config, target):
        sizes = replace(sizes, heal=_healing(sizes))
    extra, passed = extra_text(config, tokens, target.parameters, sizes.resident)
    sizes = _with_extra_text(sizes, extra, passed)
    training = fit_training(sizes) if sizes.blocks else None
    if training is not None:
        train = changed(sizes.config.train, training.changes)
        sizes = replace(sizes, config=replace(config, train=train), recompute=train.gradient_checkpointing)
    memory = stage_memory(sizes, training)
    stages = {name: replace(stage, memory=memory[name]) for name, stage in plan_stages(sizes).items()}
    disk, out = _disk(sizes), config.out or default_out(teacher.name, config.to)
    warnings = [
        *remarks,
        capacity_warning(shape, target),
        *text_warnings(config, shape, target, tokens, build),
        *memory_warnings(sizes, stages, training),
        mask_warning(sizes, training),
        precision_warning(sizes, training),
        host_warning(target),
        idle_warning(sizes),
        disk_warning(sum(disk.values()), free_bytes(out), out) if own else "",
    ]
    return Plan(
        teacher=teacher.name,
        source=str(teacher.path or teacher.hub_id),
        shape=shape,
        checkpoint_bytes=sizes.checkpoint,
        target=target,
        tokens=tokens,
        build_tokens=build,
        passes=passed,
        extra=extra,
        block=block,
        held_out=sizes.held_out,
        data=config.data.path or DEFAULT_CORPUS,
        out=out,
        memory_budget=budget,
        macro_batch=sizes.batch,
        reads=round(
            sum(stage.read for name, stage in stages.items() if name in ("build", "targets")) / sizes.checkpoint
        ),
        break_even_batch=round(sizes.checkpoint * teacher_rate(machine) / (machine.disk * 2 * shape.active_parameters)),
        stages=stages,
        disk=disk,
        from_scratch=6.0 * TOKENS_PER_PARAMETER * target.parameters**2,
        machine=machine,
        placement=with_savings(placement, sizes.heal, sizes.config.train),
        training=training.said if training else "",
        healing=healing_sentence(sizes),
        memory_settings=training.changes if training else {},
        warnings=tuple(filter(None, warnings)),
        depth=config.build.depth,
        ood=config.data.ood,
        folder_texts=texts_of_folder(config, teacher),
    )


def _sizes(
    config: RunConfig,
    teacher: ResolvedTeacher,
    shape: Geometry,
    target: Target,
    machine: Machine,
    placement: Placement,
    block: int,
    build: int,
) -> Sizes:
    """Return what all stages are planned from; build: tokens."""
    budget, tokens = placement.gpu_memory or placement.memory, config.train.tokens
    split = split_for(shape, budget, placement.memory if placement.gpu_memory else 0)
    return Sizes(
        config, shape, target, student_products(config, target), machine, block,
        blocks=max(1, tokens // block) if tokens else 0, build=max(1, build // block),
        held_out=held_out_blocks(config.data.eval_blocks, block, max(tokens, build)),
        texts=1 + bool(config.data.ood), checkpoint=checkpoint_bytes(teacher, shape), resident=split.resident,
        tied=bool(config_field(teacher.config.get_text_config(), "tie_word_embeddings")), batch=split.macro_batch, budget=budget,
        memory=placement.memory,
        passes=config.build.sweeps + scored(target.geometry, config.build.depth),
        recompute=config.train.gradient_checkpointing,
        masks=planned_mask_use(
            empty_model(target.config), config.attention, machine.device != CPU, block, config.data.document_masks == "on"
        ),
    )  # fmt: skip


def _with_extra_text(sizes: Sizes, extra: float, passed: float) -> Sizes:
    """Return sizes whose training passes its text and what the teacher writes on top `passed` times."""
    if not sizes.blocks:
        return sizes
    train = replace(sizes.config.train, epochs=passed)
    more = round(extra * sizes.blocks)
    wrote = more + round(sizes.config.write.share * sizes.blocks)
    return replace(sizes, config=replace(sizes.config, train=train), blocks=sizes.blocks + more, wrote=wrote)


def _healing(sizes: Sizes) -> TrainConfig | None:
    """Return how the build's end-to-end fit makes its steps; None where it does not fit."""
    on_gpu = sizes.machine.device != CPU
    room = heal_room(sizes.budget, resident_bytes(sizes.shape, 2) if sizes.resident else 0, on_gpu)
    return heal_settings(sizes.config.build, sizes.target, sizes.length, room, on_gpu, sizes.machine.count, sizes.masks)


def _free_memory(config: RunConfig, machine: Machine, own: bool) -> tuple[int, int | None]:
    """Return the free bytes of the machine's GPU and of its memory: of another machine all of both, of this one None for its memory."""
    if not own and machine.host_memory:
        return int(machine.memory), int(machine.host_memory) // machine.count  # one process for each device
    device = pick_device(config.teacher.device) if own else torch.device(CPU)
    return free_bytes_of(device) if device.type == "cuda" else 0, None


def teacher_rate(machine: Machine) -> float:
    """Return the FLOP/s at which a teacher runs."""
    return machine.rate("single" if machine.device == CPU else "half")


def student_products(config: RunConfig, target: Target) -> Products:
    """Return what the layers of a student multiply, as it trains: with adapters, those alone have gradients."""
    model = empty_model(target.config)
    if config.train.lora:
        model = add_adapters(model, config.train)
    return body_products(model)


def _disk(sizes: Sizes) -> dict[str, int]:
    """Return the bytes that each part of a run folder takes."""
    config, n = sizes.config, sizes.target.parameters
    trained = max(n // 50, 1) if config.train.lora else n
    return {
        "build": (1 + config.build.sweeps) * 4 * n,
        "targets": int(answers_of(sizes).disk) if sizes.blocks else 0,
        "checkpoints": 2 * (4 * n + 8 * trained) if sizes.blocks else 0,
        "model": 2 * n,
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
