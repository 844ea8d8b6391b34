"""plan(): what a conversion would build and cost, from a config and cards alone; no weights are read.

Costs follow the usual counts: 2N FLOPs per token forward, 6N forward and backward (Kaplan et al., 2001.08361), with the
active parameters for N where experts are routed; training from scratch is taken at 20 tokens a parameter (2203.15556).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.config import RunConfig
from moe2dense.errors import UserError
from moe2dense.geometry import Geometry, teacher_geometry
from moe2dense.resolve import ResolvedTeacher, resolve_teacher
from moe2dense.run import free_bytes
from moe2dense.student.footprint import STATE_COPIES, hint_layers, layer_bytes, polish_bytes, pool_limit, refit_limit
from moe2dense.student.steps import local_steps, steps_of
from moe2dense.units import parse_bytes, show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from moe2dense.student.target import Target

DEFAULT_CORPUS = "HuggingFaceFW/fineweb-edu"
TRAIN_BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and two Adam moments
TOKENS_PER_PARAMETER = 20
USUAL_BUDGET = (0.05, 0.15)  # share of the teacher's training compute that general quality takes
HIDDEN_COPIES = 5  # residual stream in and out, attention output, block input and output, while a layer runs


@dataclass(frozen=True)
class Machine:
    """What a two-second calibration measured: FLOP/s of fp32 products and bytes/s read from the disk."""

    flops: float
    disk: float


@dataclass(frozen=True)
class Plan:
    """Everything `moe2dense plan` prints. Sizes in bytes, counts in parameters and tokens, times in seconds."""

    teacher: str
    source: str
    shape: Geometry
    checkpoint_bytes: int
    target: "Target"
    tokens: int
    walk_tokens: int
    block: int
    data: str
    out: str
    memory_budget: int
    macro_batch: int
    reads: int
    break_even_batch: int
    memory: dict[str, int]
    disk: dict[str, int]
    flops: dict[str, float]
    seconds: dict[str, float]
    machine: Machine
    warnings: tuple[str, ...] = field(default=())
    depth: str = "influence"  # which layers stay where some go

    @property
    def bytes_per_token(self) -> float:
        """Checkpoint bytes read for one token position at this macro-batch."""
        return self.checkpoint_bytes / min(self.macro_batch, max(self.tokens, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        skip = {"target", "shape", "machine"}
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        target = {k: getattr(self.target, k) for k in ("to", "label", "width", "parameters", "geometry", "checkpoint")}
        student = target | {"host": self.target.card.name, "moe_shaped": self.target.card.moe_shaped}
        extra = {
            "shape": dataclasses.asdict(self.shape),
            "student": student,
            "machine": dataclasses.asdict(self.machine),
        }
        return table | extra | {"bytes_per_token": self.bytes_per_token, "warnings": list(self.warnings)}


def calibrate(path: Path | None, seconds: float = 2.0) -> Machine:
    """Measure fp32 matrix products and, where the teacher is on this disk, uncached sequential reads."""
    import os
    import time

    import torch

    a = torch.randn(1024, 1024)
    _ = a @ a
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds / 2:
        _ = a @ a
        done += 1
    flops = 2 * 1024**3 * done / (time.perf_counter() - start)
    files = sorted(path.glob("*.safetensors"), key=lambda p: -p.stat().st_size) if path else []
    if not files:
        return Machine(flops, 1e9)
    handle = os.open(files[0], os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start, got = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 2 and (chunk := os.read(handle, 1 << 22)):
            got += len(chunk)
        return Machine(flops, got / max(time.perf_counter() - start, 1e-6))
    finally:
        os.close(handle)


def checkpoint_bytes(teacher: ResolvedTeacher, shape: Geometry) -> int:
    """Size of the teacher's weight files; two bytes a parameter where they are not on this machine."""
    files = list(teacher.path.glob("*.safetensors")) if teacher.path else []
    return sum(f.stat().st_size for f in files) or 2 * shape.parameters


def memory_budget(text: str) -> int:
    """`--memory` in bytes; `auto` is half of what is free now."""
    if text == "auto":
        import psutil

        return psutil.virtual_memory().available // 2
    return parse_bytes(text, "--memory")


def resident_layer_bytes(shape: Geometry) -> int:
    """fp32 bytes of one layer's attention, norms and router plus two experts (one computing, one prefetched)."""
    outside = shape.parameters - len(shape.moe_layers) * shape.num_experts * shape.expert_parameters
    embeddings = 2 * shape.vocab_size * shape.hidden_size
    per_layer = max(outside - embeddings, 0) // shape.num_hidden_layers
    return 4 * (per_layer + 2 * shape.expert_parameters)


def macro_batch_tokens(budget: int, shape: Geometry) -> int:
    """Tokens that share one read of the weights: those whose hidden states fit beside one layer, more by spilling to disk."""
    from moe2dense.teacher.plan import LEAST_MACRO_BATCH

    room = budget - resident_layer_bytes(shape)
    return max(LEAST_MACRO_BATCH, room // (4 * HIDDEN_COPIES * shape.hidden_size))


def walk_tokens(config: RunConfig, block: int) -> int:
    """Teacher positions the walk uses: a fixed share of --tokens, whole blocks, at least one; all of a small budget."""
    wanted = min(config.walk.max_tokens, max(round(config.walk.fraction * config.train.tokens), config.walk.min_tokens))
    if config.train.tokens:
        wanted = min(wanted, config.train.tokens)
    return max(1, wanted // block) * block


def polish_asked(config: RunConfig, target: "Target") -> bool:
    """Whether the walk is to end with the end-to-end fit of the student."""
    asked = "polish" in steps_of(config.walk.init, polished=False)
    return asked and config.walk.polish_epochs > 0 and not target.checkpoint


def polish_runs(config: RunConfig, target: "Target", budget: int) -> bool:
    """Whether it does: where the student with its optimiser takes no more than `budget` bytes."""
    return polish_asked(config, target) and polish_bytes(target.parameters) <= budget


def walk_bytes(config: RunConfig, shape: Geometry, target: "Target", walk: int, budget: int) -> int:
    """Most memory of the walk beside the program's own: the teacher's layer and buffers, then whichever is largest of its pass over a
    layer, building the student's layer, and the polish. The pass counts with the most that its slices may take, so for models of a few
    layers' megabytes the number is a bound and no estimate. A pretrained student is in memory as a whole, beside a walk only where it is grafted on."""
    from moe2dense.teacher.plan import WORK_BYTES

    whole, sizes = 4 * shape.parameters, target.config
    hidden = sizes.hidden_size
    weights = whole if whole <= budget // 2 else resident_layer_bytes(shape)
    buffers = min(4 * HIDDEN_COPIES * shape.hidden_size * walk, max(budget - weights, budget // 8))
    statistics = 8 * len(shape.moe_layers) * shape.num_experts * (shape.expert_width + shape.hidden_size)
    table, states = 4 * sizes.vocab_size * hidden, 4 * hidden * walk
    building = STATE_COPIES * states + _layer_bytes(config, shape, target, walk, budget)
    polishing = hints = 0
    if polish_runs(config, target, budget):
        polishing = polish_bytes(target.parameters) + 2 * table + states
        if config.walk.polish_hints:
            hints = len(hint_layers(sizes.num_hidden_layers, states // 2, budget // 4)) * states // 2
    walking = buffers + max(table + states, WORK_BYTES + states, building)
    most = weights + statistics + hints + max(walking, polishing)
    return most if not target.checkpoint else 4 * target.parameters + (most if config.walk.graft else 0)


def _layer_bytes(config: RunConfig, shape: Geometry, target: "Target", walk: int, budget: int) -> int:
    """Most memory of building one of the student's layers, by the steps that --init has."""
    c, hidden, layers = config.walk, target.config.hidden_size, target.config.num_hidden_layers
    steps = steps_of(c.init, polish_runs(config, target, budget), target.card.join)
    local, layer_fit = (n if s in steps else 0 for n, s in ((c.local_batch, "local"), (c.layer_batch, "layer")))
    tables = target.config.vocab_size * hidden * (1 if target.config.tie_word_embeddings else 2)
    layer, ffn = (target.parameters - tables) // layers, 3 * hidden * target.width
    pool = min(shape.num_experts * shape.expert_width, pool_limit(budget // 2, target.width, hidden))
    limit, layer_fit = refit_limit(budget // 2), layer_fit if c.layer_steps else 0
    return layer_bytes(max(layer, ffn), ffn, target.width, hidden, pool, walk, limit, local, layer_fit)


def kept_states(config: RunConfig, target: "Target") -> int:
    """Hidden states of the teacher's layers beside its last that the stored targets hold, one byte a number."""
    from moe2dense.losses.matching import teacher_features
    from moe2dense.trainsetup import features_to_store

    text, layers = features_to_store(config.train, target), target.teacher.num_hidden_layers
    names = teacher_features(text, target.config.num_hidden_layers, layers)
    return sum(name.startswith("hidden-") for name in names)


def fit_flops(config: RunConfig, target: "Target", walk: int, polish: bool = True) -> float:
    """FLOPs of the walk's gradient fits: each layer's FFN, each whole layer, then the student end to end. 0 for other inits."""
    if config.walk.init != "walk":
        return 0.0
    c, sizes = config.walk, target.config
    layers, hidden = sizes.num_hidden_layers, sizes.hidden_size
    ffn = 3 * hidden * target.width
    layer = (target.parameters - 2 * sizes.vocab_size * hidden) / layers
    whole = c.layer_steps * c.layer_batch if "layer" in steps_of(c.init, polish, target.card.join) else 0
    fits = layers * (local_steps(c.local_steps, polish) * c.local_batch * ffn + whole * max(layer, ffn))
    return 6.0 * (c.sweeps * fits + polish * c.polish_epochs * walk * target.parameters)


def _warnings(shape: Geometry, target: "Target", tokens: int, walk: int, memory: dict[str, int]) -> list[str]:
    found = []
    ratio = target.parameters / shape.active_parameters
    if ratio < 0.5:
        found.append(
            f"capacity gap: the student has {ratio:.0%} of the parameters a token passes in the teacher; "
            f"a larger target, or a larger student in between, keeps more"
        )
    if walk < 20 * target.width:
        found.append(
            f"few calibration tokens: {walk} for {target.width} neurons a layer, 20 a neuron are advisable; raise --tokens"
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
            f"--lora 64 trains adapters instead, --tokens 0 stops after the walk"
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
    from moe2dense.student.shapes import scored
    from moe2dense.student.target import resolve_target

    teacher = resolve_teacher(config.model, config.teacher.card)
    shape = teacher_geometry(teacher.config, teacher.card)
    target = resolve_target(config.to, teacher.config, teacher.card, config.walk.prune, config.walk.host)
    block = block_length(config, shape.max_positions)
    tokens, walk = config.train.tokens, walk_tokens(config, block)
    machine = machine or calibrate(teacher.path)
    size = checkpoint_bytes(teacher, shape)
    budget = memory_budget(config.teacher.memory)
    batch = macro_batch_tokens(budget, shape)
    reads = -(-walk // batch) * (config.walk.sweeps + scored(target.geometry, config.walk.depth)) + -(
        -max(tokens - walk, 0) // batch
    )
    n, polish = target.parameters, polish_runs(config, target, budget)
    layer = resident_layer_bytes(shape)
    states = 4 * HIDDEN_COPIES * shape.hidden_size
    trained = n if not config.train.lora else max(n // 50, 1)
    memory = {
        "walk": walk_bytes(config, shape, target, walk, budget),
        "targets": layer + min(batch, max(tokens, block)) * states,
        "distill": 4 * n + (TRAIN_BYTES_PER_PARAMETER - 4) * trained,
        "evaluate": 4 * n,
    }
    disk = {
        "walk": (1 + config.walk.sweeps) * 4 * n,
        "targets": (2 + kept_states(config, target)) * shape.hidden_size * tokens,
        "checkpoints": 2 * (4 * n + 8 * trained) if tokens else 0,
        "model": 2 * n,
    }
    flops = {
        "teacher": 2.0 * shape.active_parameters * max(tokens, walk),
        "walk": 2.0 * shape.parameters * walk * config.walk.sweeps + fit_flops(config, target, walk, polish),
        "student": 6.0 * n * tokens * config.train.epochs,
        "from_scratch": 6.0 * n * TOKENS_PER_PARAMETER * n,
    }
    seconds = {k: flops[k] / (0.6 * machine.flops) for k in ("teacher", "walk", "student")}
    seconds["reading"] = reads * size / machine.disk
    warnings = _warnings(shape, target, max(tokens, walk), walk, memory)
    if polish_asked(config, target) and not polish:
        warnings.append(
            f"the walk ends without its end-to-end fit, which takes {show_bytes(polish_bytes(n))}; --memory is {show_bytes(budget)}"
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
        walk_tokens=walk,
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
        depth=config.walk.depth,
    )


def default_out(teacher: str, to: str) -> str:
    """./mixtral-7b for `convert mixtral --to 7b`."""
    return f"./{teacher}-{Path(to).name.replace('%', 'pct').lower()}"


def print_plan(plan: Plan, console: Any) -> None:
    """The plan as tables on a rich console."""
    from rich.table import Table

    from moe2dense.student.shapes import pruning_text

    s, t = plan.shape, plan.target
    table = Table(title=f"{plan.teacher} → {t.label}", title_justify="left", show_header=True, header_style="bold")
    for column in ("", "teacher", "student"):
        table.add_column(column)
    neurons = len(s.moe_layers) * s.num_experts * s.expert_width
    moe = f"{s.num_experts} experts, top-{s.top_k}, width {s.expert_width}"
    moe += f", shared {s.shared_width}" if s.shared_width else ""
    part = len(s.moe_layers) * t.config.num_hidden_layers / s.num_hidden_layers
    outside = pruning_text(s, t.geometry, plan.depth) or "attention, norms, embeddings whole"
    rows = [
        ("source", plan.source, f"built from the teacher ({t.card.title} host)" if not t.checkpoint else t.checkpoint),
        (
            "layers x hidden",
            f"{s.num_hidden_layers} x {s.hidden_size}",
            f"{t.config.num_hidden_layers} x {t.config.hidden_size}",
        ),
        ("FFN", moe, f"width {t.width} ({t.whole_experts:.3g} expert{'' if t.whole_experts == 1 else 's'})"),
        ("parameters", show_count(s.parameters), f"{show_count(t.parameters)} ({t.parameters / s.parameters:.0%})"),
        ("per token", show_count(s.active_parameters), show_count(t.parameters)),
        ("kept", "", f"{outside}; {part * t.width / max(neurons, 1):.0%} of the expert neurons"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    cost = Table(title="Cost", title_justify="left", header_style="bold")
    for column in ("stage", "memory", "disk", "FLOPs", "time"):
        cost.add_column(column)
    for stage, work in (("walk", "walk"), ("targets", "teacher"), ("distill", "student"), ("evaluate", "")):
        disk = plan.disk.get("checkpoints" if stage == "distill" else stage, 0)
        cost.add_row(
            stage,
            show_bytes(plan.memory[stage]),
            show_bytes(disk) if disk else "",
            f"{plan.flops[work]:.2g}" if work else "",
            show_seconds(plan.seconds[work]) if work else "",
        )
    cost.add_row("reading", "", "", "", show_seconds(plan.seconds["reading"]))
    console.print(cost)
    from_scratch = plan.flops["from_scratch"]
    spent = plan.flops["teacher"] + plan.flops["walk"] + plan.flops["student"]
    console.print(
        f"tokens: {show_count(plan.tokens)} teacher positions, {show_count(plan.walk_tokens)} of them in the walk, blocks of {plan.block}"
    )
    console.print(f"data: {plan.data}   out: {plan.out}")
    console.print(
        f"teacher reads: {plan.reads} x {show_bytes(plan.checkpoint_bytes)}; {show_bytes(plan.bytes_per_token)} per token at a macro-batch of "
        f"{show_count(plan.macro_batch)} tokens ({show_bytes(plan.memory_budget)} of memory); reading costs less than computing from {show_count(plan.break_even_batch)} tokens on"
    )
    console.print(
        f"compute: {spent:.2g} FLOPs, {100 * spent / from_scratch:.2g}% of training this student from scratch ({from_scratch:.2g})"
    )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
