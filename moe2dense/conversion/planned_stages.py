"""Plan what each stage of a conversion takes, with the formulas that the run's own counters use.

Stages have the names that run.json has. Where only data can tell a number (how many ridges are tried, whether an earlier
checkpoint is best), the usual one stands. What is not counted: generation of the report's samples, files' metadata.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moe2dense.common.flops import product
from moe2dense.common.units import parse_bytes
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.results import StagePlan
from moe2dense.distillation.cost import TrainingSteps, stored_states, training_flops, training_steps
from moe2dense.distillation.targets.formats import StoreOptions
from moe2dense.distillation.targets.rolling import store_bytes_besides, store_bytes_of_block, window_steps
from moe2dense.distillation.targets.store import token_bytes
from moe2dense.evaluation.cost import head_flops, scoring_flops, skill_tokens, transfer_flops
from moe2dense.families.machines import CPU, Machine
from moe2dense.modeling.mask_memory import NO_DOCUMENTS, MaskUse
from moe2dense.modeling.products import Products
from moe2dense.modeling.shape import Geometry
from moe2dense.student.build.cost import build_flops, build_reads, unkept_experts
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.cost import pass_flops

_FLOAT = 4  # bytes of a student's number as a run keeps it
_TRAINING_TEXT = 24  # blocks of the training text that the report scores
_CACHED = 0.8  # of main memory, which may hold what was read for other processes to read again


@dataclass(frozen=True)
class Sizes:
    """What all stages are planned from.

    body: the products of the student's layers. blocks, build, held_out: of text, of `length` tokens each; texts: how many held-out
    texts are scored. checkpoint: bytes of the teacher, `resident` where it stays in memory, `tied` where its head is its embedding;
    batch: tokens that share a reading. budget: bytes for the build, of the device that computes; memory: of main memory. heal: how
    the build's end-to-end fit makes its steps, if it is made. masks: how passes of the student make theirs. wrote: blocks of the training
    text that the teacher writes.
    """

    config: RunConfig
    shape: Geometry
    target: Target
    body: Products
    machine: Machine
    length: int
    blocks: int
    build: int
    held_out: int
    texts: int
    checkpoint: int
    resident: bool
    tied: bool
    batch: int
    budget: int
    memory: int
    passes: int
    recompute: bool
    heal: TrainConfig | None = None
    masks: MaskUse = NO_DOCUMENTS
    wrote: int = 0

    @property
    def student(self) -> int:
        """Return the bytes of a student on disk."""
        return _FLOAT * self.target.parameters

    @property
    def table(self) -> float:
        """Return the bytes of the teacher's embedding, or of its head, on disk."""
        return self.shape.vocab_size * self.shape.hidden_size * self.checkpoint / self.shape.parameters

    def devices(self, units: int) -> float:
        """Return how many devices work at once on so many units of equal size, of which each takes whole ones."""
        return units / math.ceil(units / self.machine.count) if units else 1.0

    def parts(self, blocks: int) -> int:
        """Return in how many readings the teacher answers so many blocks, of which each device has its share."""
        return math.ceil(math.ceil(blocks / self.machine.count) * self.length / self.batch)

    def reading(self, number: float) -> float:
        """Return the bytes that so many passes take from disk. The head is no part of a pass; of a teacher in memory the embedding is."""
        return number * (self.table if self.resident else self.checkpoint - (0 if self.tied else self.table))

    def written(self, number: float) -> float:
        """Return the bytes that the teacher reads to write so many tokens, one after the other."""
        return 0 if self.resident else number * self.checkpoint

    def bus(self, number: float) -> float:
        """Return the bytes that so many readings send to an accelerator."""
        return 0 if self.machine.device == CPU or self.resident else number * self.checkpoint


def plan_stages(sizes: Sizes) -> dict[str, StagePlan]:
    """Return each stage's plan, without its memory, in the order in which they run."""
    plans: dict[str, Callable[[Sizes], StagePlan]] = {"build": _build, "evaluate": _evaluate}
    if sizes.blocks:
        plans |= {"write": _write} if sizes.wrote else {}
        plans |= {"targets": _targets} if answers_of(sizes).windows == 1 else {}
        plans |= {"train-student": _train}
    if sizes.config.control:
        plans |= {"build-control": _control_build}
        plans |= {"train-control": _train} if sizes.blocks else {}
    same = sizes.target.config.hidden_size == sizes.shape.hidden_size
    if same and sizes.target.config.num_hidden_layers == sizes.shape.num_hidden_layers:
        plans["transfer"] = _transfer
    plans |= {"samples": _samples} if sizes.config.evaluate.samples else {}
    plans |= {"skills": _skills} if sizes.config.evaluate.skills else {}
    plans["export"] = _export
    return {name: _timed(plan(sizes), sizes.machine) for name, plan in plans.items()}


def _timed(plan: StagePlan, machine: Machine) -> StagePlan:
    """Fill in the seconds: computing, reading and the bus one after the other, since not all of it overlaps.

    Where several devices read the same, memory that holds what was read serves the others.
    """
    seconds = sum(number / machine.rate(precision) for precision, number in plan.busiest.items())
    cached = machine.count == 1 or plan.read < _CACHED * machine.host_memory
    seconds += (plan.read * (1 if cached else machine.count) + plan.written) / machine.disk
    seconds += plan.bus / machine.bus if plan.bus else 0.0
    return replace(plan, seconds=seconds)


def _half(sizes: Sizes) -> str:
    """Return the precision of forward passes and of training."""
    return "single" if sizes.machine.device == CPU else "half"


def _plan(*parts: tuple[str, float, float], read: float = 0.0, bus: float = 0.0, written: float = 0.0) -> StagePlan:
    """Return a stage of parts (precision, FLOPs, devices that share them)."""
    flops: dict[str, float] = {}
    busiest: dict[str, float] = {}
    for precision, number, devices in parts:
        flops[precision] = flops.get(precision, 0.0) + number
        busiest[precision] = busiest.get(precision, 0.0) + number / devices
    return StagePlan(flops, busiest, read, bus, written)


def _build(sizes: Sizes) -> StagePlan:
    config, blocks, length = sizes.config, sizes.build, sizes.length
    if sizes.target.checkpoint and not config.build.graft:
        return _plan(read=sizes.student, written=sizes.student)
    fits = build_flops(config, sizes.shape, sizes.target, sizes.body, blocks, length, sizes.budget, sizes.heal)
    passes = sizes.passes * pass_flops(sizes.shape, blocks, length)
    experts = build_reads(config, sizes.shape, sizes.memory) - 1  # of the first sweep, beyond those of its pass
    again = 0.0 if sizes.resident else sizes.parts(blocks) * experts * _expert_bytes(sizes)
    read = (
        sizes.reading(sizes.parts(blocks) * sizes.passes)
        + again
        + _copied(sizes)
        + (sizes.heal is not None and not _head_read_before(sizes)) * sizes.table
    )
    if sizes.resident:
        read += sizes.checkpoint - (1 if sizes.tied else 2) * sizes.table
    written = (1 + config.build.sweeps) * sizes.student
    fast = "single" if sizes.machine.device == CPU else "tf32"
    healing = _half(sizes) if sizes.heal is not None and sizes.heal.weights == "bfloat16" else fast
    shared = sizes.devices(blocks)
    return _plan(
        (_half(sizes), passes, shared),
        (fast, fits.layers, shared),
        (fast, fits.layer_fits, sizes.devices(max(1, config.build.layer_batch // length))),
        (healing, fits.heal, sizes.devices(max(1, config.build.heal_batch // length))),
        ("single", fits.grams, shared),
        ("single", fits.solutions, 1),
        read=read + sizes.student,
        bus=sizes.bus(sizes.parts(blocks) * (sizes.passes + experts)),
        written=written,
    )


def _head_read_before(sizes: Sizes) -> bool:
    """Return whether the teacher's head is in memory before the build: stores that follow one another are measured with it."""
    return sizes.blocks > 0 and answers_of(sizes).windows > 1


def _expert_bytes(sizes: Sizes) -> float:
    """Return the bytes of all routed experts on disk."""
    shape = sizes.shape
    inside = len(shape.moe_layers) * shape.num_experts * shape.expert_parameters
    return inside * sizes.checkpoint / shape.parameters


def _copied(sizes: Sizes) -> float:
    """Return the bytes of what is read for the student itself: the teacher's tensors outside its experts, the embedding once more."""
    return sizes.checkpoint - _expert_bytes(sizes) + sizes.table


def _control_build(sizes: Sizes) -> StagePlan:
    """The control is as random as its --init says, and healed as the student is."""
    init = "random+heal" if "heal" in sizes.config.build.init or sizes.config.build.init == "layerwise" else "random"
    config = replace(sizes.config, build=replace(sizes.config.build, init=init))
    plan = _build(replace(sizes, config=config))
    copied = sizes.checkpoint - _expert_bytes(sizes)
    return replace(plan, read=sizes.reading(sizes.parts(sizes.build)) + copied + sizes.student)


@dataclass(frozen=True)
class Answers:
    """What the teacher answers of the training text in all. windows: how many stores follow one another; 1 = one for all text,
    0 = none, the teacher answers each step.
    """

    blocks: int
    readings: int
    windows: int
    disk: float


def answers_of(sizes: Sizes) -> Answers:
    """Return what training takes of the teacher: one store of the whole text, or windows that fit in train.targets_disk."""
    options = store_options(sizes.config, sizes.target)
    each = store_bytes_of_block(options, sizes.shape.hidden_size, sizes.shape.vocab_size, sizes.length)
    fixed = store_bytes_besides(options, int(sizes.table))
    whole = Answers(sizes.blocks, sizes.parts(sizes.blocks), 1, fixed + each * sizes.blocks)
    limit = sizes.config.train.targets_disk
    if not limit or sizes.config.train.targets or whole.disk <= (room := parse_bytes(limit, "--targets-disk")):
        return whole
    length = steps_of_training(sizes)
    steps = window_steps(room, fixed, each, length.per_step)
    if not steps:
        return Answers(length.steps * length.per_step, 0, 0, 0.0)
    windows = [min(sizes.blocks, n * length.per_step) for n in _in_turns(length.steps, steps)]
    return Answers(sum(windows), sum(map(sizes.parts, windows)), len(windows), fixed + each * max(windows))


def _in_turns(total: int, most: int) -> list[int]:
    """Return `total` in parts of `most`, the last of which may be smaller."""
    return [min(most, total - start) for start in range(0, total, most)]


def _answering(sizes: Sizes, answers: Answers) -> StagePlan:
    """The teacher's passes over the training text, and what of them is written."""
    config, tokens = sizes.config, answers.blocks * sizes.length
    draws = max(1, config.teacher.draws)
    flops = pass_flops(sizes.shape, answers.blocks, sizes.length)
    if config.train.target_format != "hidden":
        flops += product(tokens, sizes.shape.hidden_size, sizes.shape.vocab_size)
    return _plan(
        (_half(sizes), draws * flops, sizes.devices(max(1, answers.blocks // max(1, answers.windows)))),
        read=draws * sizes.reading(answers.readings),
        bus=draws * sizes.bus(answers.readings),
        written=draws * tokens * target_bytes(config, sizes.target) if answers.windows else 0.0,
    )


def _write(sizes: Sizes) -> StagePlan:
    """The training text that the teacher writes, a token of every text at a time, as many at once as write.shard says."""
    shape, write = sizes.shape, sizes.config.write
    flops = pass_flops(shape, sizes.wrote, sizes.length)
    flops += product(sizes.wrote * sizes.length, shape.hidden_size, shape.vocab_size)
    rounds = math.ceil(sizes.wrote / write.shard)
    new = rounds * (write.new_tokens or max(1, sizes.length - write.prompt_tokens))
    return _plan((_half(sizes), flops, sizes.devices(sizes.wrote)), read=sizes.written(new), bus=sizes.bus(new))


def _targets(sizes: Sizes) -> StagePlan:
    """The teacher's answers on the training text."""
    return _answering(sizes, answers_of(sizes))


def target_bytes(config: RunConfig, target: Target) -> float:
    """Return the bytes of what is stored of the teacher for a token."""
    return token_bytes(store_options(config, target), target.teacher.hidden_size, target.teacher.vocab_size)


def store_options(config: RunConfig, target: Target) -> StoreOptions:
    """Return how the targets are stored."""
    states = tuple(f"hidden-{i}" for i in range(stored_states(config, target)))
    return StoreOptions(config.train.target_format, features=states)


def steps_of_training(sizes: Sizes) -> TrainingSteps:
    """Return how long the training is."""
    return training_steps(sizes.config.train, sizes.target.parameters, sizes.blocks, sizes.length)


def _train(sizes: Sizes) -> StagePlan:
    """Steps and checks; where the teacher answers one window of the text after another, it does so within this stage."""
    steps, answers = steps_of_training(sizes), answers_of(sizes)
    config, target = sizes.config.train, sizes.target
    flops = training_flops(config, target, sizes.body, steps, sizes.held_out, sizes.recompute)
    read = steps.steps * steps.per_step * sizes.length * target_bytes(sizes.config, target) if answers.windows else 0.0
    training = _plan((_half(sizes), flops, sizes.devices(steps.per_step)), read=read, written=sizes.student)
    return training if answers.windows == 1 else _together(training, _answering(sizes, answers))


def _together(one: StagePlan, other: StagePlan) -> StagePlan:
    """Return the sum of two parts of a stage."""
    flops, busiest = (
        {p: a.get(p, 0.0) + b.get(p, 0.0) for p in a | b}
        for a, b in ((one.flops, other.flops), (one.busiest, other.busiest))
    )
    return StagePlan(flops, busiest, one.read + other.read, one.bus + other.bus, one.written + other.written)


def _evaluate(sizes: Sizes) -> StagePlan:
    """The teacher on the held-out texts, and the students: as built, at the last step, as exported; the control twice."""
    students = (3 if sizes.blocks else 1) + (3 if sizes.blocks else 1) * sizes.config.control
    blocks, length, shape = sizes.held_out, sizes.length, sizes.shape
    one = scoring_flops(sizes.target, sizes.body, blocks, length)
    passes = sizes.texts * pass_flops(shape, blocks, length)
    scores = sizes.texts * (2 * head_flops(shape, blocks, length) + students * one)
    learnt = min(_TRAINING_TEXT, sizes.blocks) if sizes.blocks and answers_of(sizes).windows == 1 else 0
    own = scoring_flops(sizes.target, sizes.body, learnt, length) if learnt else 0.0
    parts = sizes.texts * sizes.parts(blocks)
    read = sizes.reading(parts) + (sizes.heal is None and not _head_read_before(sizes)) * sizes.table
    shared = sizes.devices(blocks)
    own_part = ("single", own, sizes.devices(learnt))
    return _plan((_half(sizes), passes, shared), ("single", scores, shared), own_part, read=read, bus=sizes.bus(parts))


def _transfer(sizes: Sizes) -> StagePlan:
    """The teacher streams once over the held-out text; experts that are not kept meanwhile are read once more for what they compute."""
    passes = pass_flops(sizes.shape, sizes.held_out, sizes.length)
    measured = transfer_flops(sizes.target, sizes.held_out, sizes.length)
    measured += 2 * sizes.body.forward(sizes.held_out, sizes.length)
    again = unkept_experts(sizes.shape, sizes.memory)
    read = sizes.reading(1) + (0.0 if sizes.resident else again * _expert_bytes(sizes)) + sizes.student
    return _plan((_half(sizes), passes, 1), ("single", measured, 1), read=read, bus=sizes.bus(1 + again))


def _samples(sizes: Sizes) -> StagePlan:
    """The continuations of the teacher, a reading for each token where it is on disk, and the scores of what was written."""
    options = sizes.config.evaluate
    tokens = options.samples * (options.prompt_tokens + options.sample_tokens)
    limit = parse_bytes(options.teacher_read, "evaluate.teacher_read") // max(sizes.checkpoint, 1)
    written = min(options.sample_tokens, limit) if limit >= 8 else 0
    flops = 4 * pass_flops(sizes.shape, 1, tokens) + 4 * sizes.body.forward(1, tokens)
    return _plan((_half(sizes), flops, 1), read=sizes.written(written + 1), bus=sizes.bus(written + 1))


def _skills(sizes: Sizes) -> StagePlan:
    """Teacher, student, student before training and control on small tasks."""
    tokens, students = skill_tokens(sizes.config.evaluate.skills), 2 + sizes.config.control
    rows, length = max(1, tokens // 32), 32
    flops = pass_flops(sizes.shape, rows, length) + students * sizes.body.forward(rows, length)
    loads = (1 + sizes.config.control) * sizes.student
    return _plan((_half(sizes), flops, sizes.devices(rows)), read=sizes.written(1) + loads, bus=sizes.bus(1))


def _export(sizes: Sizes) -> StagePlan:
    size = {"float32": 4}.get(sizes.config.export.dtype, 2) * sizes.target.parameters
    return _plan(read=size, written=size)
