"""Plan what each stage of a conversion takes, with the formulas that the run's own counters use.

Stages have the names that run.json has. Where only data can tell a number (how many ridges are tried, whether an earlier
checkpoint is best), the usual one stands. What is not counted: generation of the report's samples, files' metadata.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from moe2dense.common.flops import product
from moe2dense.common.units import parse_bytes
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.conversion.results import StagePlan
from moe2dense.distillation.cost import TrainingSteps, stored_states, training_flops, training_steps
from moe2dense.evaluation.cost import head_flops, scoring_flops, skill_tokens, transfer_flops
from moe2dense.families.machines import CPU, Machine
from moe2dense.modeling.products import Products
from moe2dense.modeling.shape import Geometry
from moe2dense.student.build.cost import build_flops, build_reads
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.cost import pass_flops

_FLOAT = 4  # bytes of a student's number as a run keeps it
_TRAINING_TEXT = 24  # blocks of the training text that the report scores


@dataclass(frozen=True)
class Sizes:
    """What all stages are planned from.

    body: the products of the student's layers. blocks, build, held_out: of text, of `length` tokens each; texts: how many held-out
    texts are scored. checkpoint: bytes of the teacher, `resident` where it stays in memory; batch: tokens that share a reading.
    budget: bytes for the build. heal: how the build's end-to-end fit makes its steps, if it is made.
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
    batch: int
    budget: int
    passes: int
    recompute: bool
    heal: TrainConfig | None = None

    @property
    def student(self) -> int:
        """Return the bytes of a student on disk."""
        return _FLOAT * self.target.parameters

    def parts(self, blocks: int) -> int:
        """Return in how many readings the teacher answers so many blocks."""
        return -(-blocks * self.length // self.batch)

    def readings(self, number: float) -> float:
        """Return the bytes that so many readings take from disk; a teacher in memory was read by the build."""
        return 0 if self.resident else number * self.checkpoint

    def bus(self, number: float) -> float:
        """Return the bytes that so many readings send to an accelerator."""
        return 0 if self.machine.device == CPU or self.resident else number * self.checkpoint


def plan_stages(sizes: Sizes) -> dict[str, StagePlan]:
    """Return each stage's plan, without its memory, in the order in which they run."""
    plans: dict[str, Callable[[Sizes], StagePlan]] = {"build": _build, "evaluate": _evaluate}
    if sizes.blocks:
        plans |= {"targets": _targets, "train-student": _train}
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
    """Fill in the seconds: computing, reading and the bus one after the other, since not all of it overlaps."""
    seconds = sum(number / machine.rate(precision) for precision, number in plan.flops.items())
    seconds += (plan.read + plan.written) / machine.disk
    seconds += plan.bus / machine.bus if plan.bus else 0.0
    return replace(plan, seconds=seconds)


def _half(sizes: Sizes) -> str:
    """Return the precision of forward passes and of training."""
    return "single" if sizes.machine.device == CPU else "half"


def _added(*parts: tuple[str, float]) -> dict[str, float]:
    flops: dict[str, float] = {}
    for precision, number in parts:
        flops[precision] = flops.get(precision, 0.0) + number
    return flops


def _build(sizes: Sizes) -> StagePlan:
    config, blocks = sizes.config, sizes.build
    fits = build_flops(config, sizes.shape, sizes.target, sizes.body, blocks, sizes.length, sizes.budget, sizes.heal)
    passes = sizes.passes * pass_flops(sizes.shape, blocks, sizes.length)
    reads = sizes.parts(blocks) * (sizes.passes - 1 + build_reads(config, sizes.shape, sizes.budget))
    read = (1 if sizes.resident else reads) * sizes.checkpoint + _copied(sizes)
    written = (1 + config.build.sweeps) * sizes.student
    if sizes.target.checkpoint and not config.build.graft:
        return StagePlan({}, read=sizes.student, written=sizes.student)
    fast = "single" if sizes.machine.device == CPU else "tf32"
    healing = _half(sizes) if sizes.heal is not None and sizes.heal.weights == "bfloat16" else fast
    flops = _added((_half(sizes), passes), (fast, fits.layers), (healing, fits.heal), ("single", fits.exact))
    return StagePlan(flops, read + sizes.student, sizes.bus(reads), written)


def _copied(sizes: Sizes) -> float:
    """Return the bytes of what is read for the student itself: the teacher's tensors outside its experts, the embedding once more."""
    shape = sizes.shape
    inside = len(shape.moe_layers) * shape.num_experts * shape.expert_parameters
    numbers = shape.parameters - inside + shape.vocab_size * shape.hidden_size
    return numbers * sizes.checkpoint / shape.parameters


def _control_build(sizes: Sizes) -> StagePlan:
    """The control is as random as its --init says, and healed as the student is."""
    init = "random+heal" if "heal" in sizes.config.build.init or sizes.config.build.init == "layerwise" else "random"
    config = replace(sizes.config, build=replace(sizes.config.build, init=init))
    plan = _build(replace(sizes, config=config))
    return replace(plan, read=sizes.readings(sizes.parts(sizes.build)) + sizes.student)


def _targets(sizes: Sizes) -> StagePlan:
    """The teacher's answers on the training text."""
    settings, parts = sizes.config.train, sizes.parts(sizes.blocks)
    flops = pass_flops(sizes.shape, sizes.blocks, sizes.length)
    if settings.target_format != "hidden":
        flops += product(sizes.blocks * sizes.length, sizes.shape.hidden_size, sizes.shape.vocab_size)
    draws = max(1, sizes.config.teacher.draws)
    written = draws * target_bytes(sizes.config, sizes.target) * sizes.blocks * sizes.length
    return StagePlan({_half(sizes): draws * flops}, draws * sizes.readings(parts), draws * sizes.bus(parts), written)


def target_bytes(config: RunConfig, target: Target) -> int:
    """Return the bytes of what is stored of the teacher for a token."""
    return (2 + stored_states(config, target)) * target.teacher.hidden_size


def steps_of_training(sizes: Sizes) -> TrainingSteps:
    """Return how long the training is."""
    return training_steps(sizes.config.train, sizes.target.parameters, sizes.blocks, sizes.length)


def _train(sizes: Sizes) -> StagePlan:
    steps = steps_of_training(sizes)
    config, target = sizes.config.train, sizes.target
    flops = training_flops(config, target, sizes.body, steps, sizes.held_out, sizes.recompute)
    read = steps.steps * steps.per_step * sizes.length * target_bytes(sizes.config, target)
    return StagePlan({_half(sizes): flops}, read + sizes.student, written=sizes.student)


def _evaluate(sizes: Sizes) -> StagePlan:
    """The teacher on the held-out texts, and the students: as built, at the last step, as exported; the control twice."""
    students = (3 if sizes.blocks else 1) + (3 if sizes.blocks else 1) * sizes.config.control
    blocks, length, shape = sizes.held_out, sizes.length, sizes.shape
    one = scoring_flops(sizes.target, sizes.body, blocks, length)
    passes = sizes.texts * pass_flops(shape, blocks, length)
    scores = sizes.texts * (2 * head_flops(shape, blocks, length) + students * one)
    if sizes.blocks:
        scores += scoring_flops(sizes.target, sizes.body, min(_TRAINING_TEXT, sizes.blocks), length)
    parts = sizes.texts * sizes.parts(blocks)
    loads = sizes.config.control * 2 * sizes.student
    flops = _added((_half(sizes), passes), ("single", scores))
    return StagePlan(flops, sizes.readings(parts) + loads, sizes.bus(parts))


def _transfer(sizes: Sizes) -> StagePlan:
    """The teacher streams once over the held-out text, and the experts are read once more for what they compute."""
    passes = pass_flops(sizes.shape, sizes.held_out, sizes.length)
    measured = transfer_flops(sizes.target, sizes.held_out, sizes.length)
    measured += 2 * sizes.body.forward(sizes.held_out, sizes.length)
    return StagePlan(
        _added((_half(sizes), passes), ("single", measured)), sizes.readings(2) + sizes.student, sizes.bus(2)
    )


def _samples(sizes: Sizes) -> StagePlan:
    """The continuations of the teacher, a reading for each token where it is on disk, and the scores of what was written."""
    options = sizes.config.evaluate
    tokens = options.samples * (options.prompt_tokens + options.sample_tokens)
    limit = parse_bytes(options.teacher_read, "evaluate.teacher_read") // max(sizes.checkpoint, 1)
    written = min(options.sample_tokens, limit) if limit >= 8 else 0
    flops = 4 * pass_flops(sizes.shape, 1, tokens) + 4 * sizes.body.forward(1, tokens)
    return StagePlan({_half(sizes): flops}, sizes.readings(written + 1), sizes.bus(written + 1))


def _skills(sizes: Sizes) -> StagePlan:
    """Teacher, student, student before training and control on small tasks."""
    tokens, students = skill_tokens(sizes.config.evaluate.skills), 2 + sizes.config.control
    rows, length = max(1, tokens // 32), 32
    flops = pass_flops(sizes.shape, rows, length) + students * sizes.body.forward(rows, length)
    loads = (1 + sizes.config.control) * sizes.student
    return StagePlan({_half(sizes): flops}, sizes.readings(1) + loads, sizes.bus(1))


def _export(sizes: Sizes) -> StagePlan:
    size = {"float32": 4}.get(sizes.config.export.dtype, 2) * sizes.target.parameters
    return StagePlan({}, read=size, written=size)
