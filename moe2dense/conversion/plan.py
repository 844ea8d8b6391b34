"""plan(): what a conversion would build and cost, from a config and cards alone; no weights are read.

Costs follow the usual counts: 2N FLOPs per token forward, 6N forward and backward (Kaplan et al., 2001.08361), with the
active parameters for N where experts are routed; training from scratch is taken at 20 tokens a parameter (2203.15556).
"""

from typing import TYPE_CHECKING

from moe2dense.common.files import free_bytes
from moe2dense.common.units import show_bytes
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.conversion.configure import default_out
from moe2dense.conversion.machine import Machine, calibrate
from moe2dense.conversion.results import Plan
from moe2dense.distillation.auto_features import kept_states
from moe2dense.errors import UserError
from moe2dense.families.resolve import resolve_teacher
from moe2dense.modeling.shape import Geometry, teacher_geometry
from moe2dense.student.build.cost import build_bytes, build_tokens, fit_flops, heal_asked, heal_runs
from moe2dense.student.footprint import heal_bytes
from moe2dense.teacher.cost import (
    HIDDEN_COPIES,
    checkpoint_bytes,
    macro_batch_tokens,
    memory_budget,
    resident_layer_bytes,
)

if TYPE_CHECKING:
    from moe2dense.student.target.resolve import Target

TRAIN_BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and two Adam moments
TOKENS_PER_PARAMETER = 20
USUAL_BUDGET = (0.05, 0.15)  # share of the teacher's training compute that general quality takes


def _warnings(shape: Geometry, target: "Target", tokens: int, build: int, memory: dict[str, int]) -> list[str]:
    found = []
    ratio = target.parameters / shape.active_parameters
    if ratio < 0.5:
        found.append(
            f"capacity gap: the student has {ratio:.0%} of the parameters a token passes in the teacher; "
            f"a larger target, or a larger student in between, keeps more"
        )
    if build < 20 * target.width:
        found.append(
            f"few calibration tokens: {build} for {target.width} neurons a layer, 20 a neuron are advisable; raise --tokens"
        )
    trained = 6 * shape.active_parameters * TOKENS_PER_PARAMETER * shape.active_parameters
    share = (2 * shape.active_parameters + 6 * target.parameters) * tokens / trained
    if share < USUAL_BUDGET[0]:
        found.append(
            f"distillation budget: about {share:.1g} of the teacher's training compute; general quality takes "
            f"{USUAL_BUDGET[0]:.0%} to {USUAL_BUDGET[1]:.0%}, so expect the student to follow the teacher closest on text like --data"
        )
    import psutil

    total = psutil.virtual_memory().total
    if memory["distill"] > total:
        found.append(
            f"memory: training all weights takes {show_bytes(memory['distill'])} and this machine has {show_bytes(total)}; "
            f"--lora 64 trains adapters instead, --tokens 0 stops after the build"
        )
    if target.card.moe_shaped:
        found.append(
            f"the {target.card.title} host keeps an MoE wrapper around one expert; see what loads it in `moe2dense list`"
        )
    return found


def block_length(config: RunConfig, max_positions: int) -> int:
    """Tokens per block: --block, else min(2048, the teacher's max positions). Raises UserError beyond what the teacher takes."""
    if config.data.block > max_positions:
        raise UserError(f"--block {config.data.block} is more than the teacher's {max_positions} positions")
    return config.data.block or min(2048, max_positions)


def make_plan(config: RunConfig, machine: Machine | None = None) -> Plan:
    """The plan of a resolved run. Raises UserError for a teacher or target that cannot be converted."""
    from moe2dense.student.target.pruned import scored
    from moe2dense.student.target.resolve import resolve_target

    teacher = resolve_teacher(config.model, config.teacher.card)
    shape = teacher_geometry(teacher.config, teacher.card)
    target = resolve_target(config.to, teacher.config, teacher.card, config.build.prune, config.build.host)
    block = block_length(config, shape.max_positions)
    tokens, build = config.train.tokens, build_tokens(config, block)
    machine = machine or calibrate(teacher.path)
    size = checkpoint_bytes(teacher, shape)
    budget = memory_budget(config.teacher.memory)
    batch = macro_batch_tokens(budget, shape)
    reads = -(-build // batch) * (config.build.sweeps + scored(target.geometry, config.build.depth)) + -(
        -max(tokens - build, 0) // batch
    )
    n, heal = target.parameters, heal_runs(config, target, budget)
    layer = resident_layer_bytes(shape)
    states = 4 * HIDDEN_COPIES * shape.hidden_size
    trained = n if not config.train.lora else max(n // 50, 1)
    memory = {
        "build": build_bytes(config, shape, target, build, budget),
        "targets": layer + min(batch, max(tokens, block)) * states,
        "distill": 4 * n + (TRAIN_BYTES_PER_PARAMETER - 4) * trained,
        "evaluate": 4 * n,
    }
    disk = {
        "build": (1 + config.build.sweeps) * 4 * n,
        "targets": (2 + kept_states(config, target)) * shape.hidden_size * tokens,
        "checkpoints": 2 * (4 * n + 8 * trained) if tokens else 0,
        "model": 2 * n,
    }
    flops = {
        "teacher": 2.0 * shape.active_parameters * max(tokens, build),
        "build": 2.0 * shape.parameters * build * config.build.sweeps + fit_flops(config, target, build, heal),
        "student": 6.0 * n * tokens * config.train.epochs,
        "from_scratch": 6.0 * n * TOKENS_PER_PARAMETER * n,
    }
    seconds = {k: flops[k] / (0.6 * machine.flops) for k in ("teacher", "build", "student")}
    seconds["reading"] = reads * size / machine.disk
    warnings = _warnings(shape, target, max(tokens, build), build, memory)
    if heal_asked(config, target) and not heal:
        warnings.append(
            f"the build ends without its end-to-end fit, which takes {show_bytes(heal_bytes(n))}; --memory is {show_bytes(budget)}"
        )
    out = config.out or default_out(teacher.name, config.to)
    free, needed = free_bytes(out), sum(disk.values())
    if needed > free:
        warnings.append(f"disk: the run writes {show_bytes(needed)} and {show_bytes(free)} are free at --out {out}")
    return Plan(
        teacher=teacher.name,
        source=str(teacher.path or teacher.hub_id),
        shape=shape,
        checkpoint_bytes=size,
        target=target,
        tokens=tokens,
        build_tokens=build,
        block=block,
        data=config.data.path or DEFAULT_CORPUS,
        out=out,
        memory_budget=budget,
        macro_batch=batch,
        reads=reads,
        break_even_batch=round(size * 0.6 * machine.flops / (machine.disk * 2 * shape.active_parameters)),
        memory=memory,
        disk=disk,
        flops=flops,
        seconds=seconds,
        machine=machine,
        warnings=tuple(warnings),
        depth=config.build.depth,
    )
