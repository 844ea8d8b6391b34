"""The stages of a conversion. Each reads its result back from the run folder when the run already has it."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.config import RunConfig
from moe2dense.errors import UserError
from moe2dense.planning import DEFAULT_CORPUS, Plan
from moe2dense.run import Run
from moe2dense.units import show_count

if TYPE_CHECKING:
    from moe2dense.data import Blocks
    from moe2dense.evaluation import Reference, Scores
    from moe2dense.student.target import Target
    from moe2dense.student.types import Student


@dataclass
class Text:
    """The blocks of a run: the walk's are the first of the training blocks."""

    train: "Blocks"
    valid: "Blocks"
    ood: "Blocks | None"
    walk: "Blocks"


@dataclass
class Job:
    """What every stage needs."""

    run: Run
    settings: RunConfig
    plan: Plan
    teacher: Any
    text: Text
    progress: Any
    references: dict[str, "Reference"] = field(default_factory=dict)
    leader: Any = None  # what the student is made from where that is not the teacher: the student of the stage before

    @property
    def source(self) -> Any:
        """Whose layers and targets make the student."""
        return self.teacher if self.leader is None else self.leader

    @property
    def target(self) -> "Target":
        """The student's shape, as it is copied from the source."""
        from moe2dense.student.single import target_from

        return target_from(self.source, self.plan.target)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Record a stage as finished, with its seconds and whatever the body puts into the entry."""
        entry: dict[str, Any] = {}
        start = time.perf_counter()
        yield entry
        self.run.finish(stage, seconds=round(time.perf_counter() - start, 2), **entry)


def check_settings(settings: RunConfig) -> None:
    """Refuse what no stage could do, before anything is read. Raises UserError naming the flag."""
    from moe2dense.regimes.choose import check_regime_settings
    from moe2dense.regimes.texts import check_text_settings
    from moe2dense.student.methods import parse_method
    from moe2dense.trainsetup import check_training

    parse_method(settings.walk.init)
    check_training(settings.train)
    check_text_settings(settings)
    check_regime_settings(settings)
    for flag, value, known in (
        ("--experts", settings.teacher.experts, ["auto", "streamed", "grouped_mm", "megablocks"]),
        ("--dtype", settings.export.dtype, ["bfloat16", "float16", "float32"]),
        ("--quantize", settings.export.quantize, ["", "int8", "int4"]),
        ("walk.prune", settings.walk.prune, ["auto", "width", "depth", "heads"]),
        ("walk.depth", settings.walk.depth, ["influence", "alternate"]),
    ):
        if value not in known:
            raise UserError(f"{flag} must be one of {', '.join(k for k in known if k)}; found {value!r}")
    for flag, value in (
        ("--tokens", settings.train.tokens),
        ("--lora", settings.train.lora),
        ("--block", settings.data.block),
    ):
        if value < 0:
            raise UserError(f"{flag} must not be negative; found {value}")
    if settings.train.temperature <= 0:
        raise UserError(f"--temperature must be above 0; found {settings.train.temperature}")
    if not 0 <= settings.train.alpha <= 1:
        raise UserError(f"--alpha must be between 0 and 1; found {settings.train.alpha}")


def load_text(settings: RunConfig, plan: Plan, tokenizer: Any) -> Text:
    """The blocks of the run. Raises UserError for text that is missing, empty or shorter than one block."""
    from moe2dense.data import load_blocks

    data, block = settings.data, plan.block
    source = data.path or DEFAULT_CORPUS
    options = {"seed": settings.seed, "document_masks": data.document_masks}
    wanted = max(plan.tokens, plan.walk_tokens)
    train = load_blocks(source, tokenizer, block, "train", tokens=wanted, **options)
    held = data.eval_blocks * block
    own = _split_of(data.valid, "valid") if data.valid else "valid"
    valid = load_blocks(data.valid or source, tokenizer, block, own, tokens=held, **options)
    ood = (
        load_blocks(data.ood, tokenizer, block, _split_of(data.ood, "ood"), tokens=held, **options)
        if data.ood
        else None
    )
    count = max(1, min(len(train), plan.walk_tokens // block))
    spread = [i * len(train) // count for i in range(count)]  # over many passages: worth more than any setting
    return Text(train, valid, ood, train[spread])


def shortfall(text: Text, plan: Plan) -> str:
    """A sentence when the data holds noticeably fewer tokens than asked for, else ''."""
    wanted, found = max(plan.tokens, plan.walk_tokens), text.train.tokens
    if found >= 0.9 * wanted:
        return ""
    return f"the data has {show_count(found)} tokens for training, {show_count(wanted)} were asked for; all of them are used"


def _split_of(path: str, split: str) -> str:
    """A file given for one purpose is used as it stands; a folder or hub dataset has a split for it."""
    return "all" if Path(path).is_file() else split


def walk(job: Job) -> "Student":
    """Build the student layer by layer beside the teacher."""
    from moe2dense.regimes.texts import lesson_teacher
    from moe2dense.student.build import build_to_folder
    from moe2dense.student.store import load_student, save_student

    folder = job.run.folder / "walk"
    if job.run.finished("walk"):
        return load_student(folder / "student")
    settings = job.settings
    with job.timed("walk") as entry:
        build_to_folder(
            lesson_teacher(job),
            to=job.target,
            data=job.text.walk,
            folder=folder / "student",
            out=folder,
            init=settings.walk.init,
            config=settings.walk,
            seed=settings.seed,
            progress=lambda name, *counts, **numbers: job.progress(
                name, *counts, **{k: v for k, v in numbers.items() if k == "error"}
            ),
        )
        student = load_student(folder / "student")  # as a resumed run does, so that both train the same module
        if (
            job.leader is not None
        ):  # where the neurons of a dense leader come from says nothing of the teacher's experts
            student.fate, student.teacher_path = [None] * len(student.fate), str(job.teacher.path)
            save_student(student, folder / "student")
        entry |= {"tokens": student.walk_tokens, "history": student.history}
    return student


def reference_for(job: Job, which: str) -> "Reference":
    """The teacher's final hidden states on held-out text, computed once per process."""
    from moe2dense.evaluation import reference

    if which not in job.references:
        blocks = job.text.valid if which == "valid" else job.text.ood
        job.references[which] = reference(job.teacher, blocks)
    return job.references[which]


def token_counts(job: Job) -> Any:
    """How often each token id stands in the training text [V]."""
    import torch

    return torch.bincount(job.text.train.input_ids.flatten(), minlength=job.plan.shape.vocab_size)


def score(job: Job, student: Any) -> dict[str, "Scores"]:
    """A student's numbers on the held-out and, where given, the out-of-distribution text."""
    from moe2dense.evaluation import evaluate

    counts, seed = token_counts(job), job.settings.seed
    return {t: evaluate(student, reference_for(job, t), token_counts=counts, seed=seed) for t in _texts(job)}


def _texts(job: Job) -> list[str]:
    return ["valid"] if job.text.ood is None else ["valid", "ood"]


def score_teacher(job: Job) -> dict[str, "Scores"]:
    """The teacher's own row: its likelihood of the text; everything relative to itself is zero."""
    from moe2dense.evaluation import evaluate

    counts, seed = token_counts(job), job.settings.seed
    truths = {t: reference_for(job, t) for t in _texts(job)}
    return {t: evaluate(truth, truth, token_counts=counts, seed=seed) for t, truth in truths.items()}


def train(job: Job, student: "Student", row: str = "student") -> "Student":
    """Distil the student on the teacher's targets; returns it with the final weights."""
    from moe2dense.regimes.choose import regime_of
    from moe2dense.student.store import load_student, save_student
    from moe2dense.training import distill

    folder = job.run.folder if row == "student" else job.run.folder / row
    stage, final = f"train-{row}", folder / "checkpoints" / "final"
    if job.run.finished(stage):
        return load_student(final)
    settings = job.settings
    with job.timed(stage) as entry:
        result = distill(
            student,
            data=job.text.train,
            targets=training_targets(job),
            tokens=job.text.train.tokens,
            valid=job.text.valid,
            valid_targets=reference_for(job, "valid"),
            config=settings.train,
            seed=settings.seed,
            out=folder,
            resume=True,
            regime=regime_of(job),
            progress=lambda name, *rest, **numbers: job.progress(
                name if row == "student" else f"{name} {row}", *rest, **numbers
            ),
        )
        save_student(student, final)
        entry |= {
            "tokens": result.tokens,
            "steps": result.steps,
            "best_step": result.best_step,
            "history": result.history,
        }
    return student


def training_targets(job: Job) -> Any:
    """The teacher's targets on the training text: the store the user names, else one written to the run folder; None for hard labels alone."""
    from moe2dense.losses.matching import teacher_features
    from moe2dense.regimes.choose import brings_targets
    from moe2dense.regimes.mixture import MixedTargets
    from moe2dense.regimes.texts import lesson_teacher, needs_targets
    from moe2dense.targets import open_targets, write_targets
    from moe2dense.trainsetup import features_to_store

    settings = job.settings.train
    if not needs_targets(job.settings) or brings_targets(settings.regime, job.settings.regime):
        return None
    if settings.targets:
        return open_targets(settings.targets, job.text.train)
    draws = 1 if job.leader is not None else max(1, job.settings.teacher.draws)
    features = features_to_store(settings, job.target) if draws == 1 else ""  # of several answers there is none
    folder = job.run.folder / "targets"
    folders = [folder] if draws == 1 else [folder / f"draw-{draw}" for draw in range(draws)]
    if not job.run.finished("targets"):
        with job.timed("targets"):
            for draw, place in enumerate(folders):
                write_targets(
                    lesson_teacher(job, targets=True, draw=draw),
                    job.text.train,
                    place,
                    format=settings.target_format,
                    temperature=settings.temperature,
                    seed=job.settings.seed,
                    features=teacher_features(
                        features, job.target.config.num_hidden_layers, job.target.teacher.num_hidden_layers
                    ),
                    routing=[settings.token_weights] * bool(settings.token_weights),
                    progress=job.progress,
                )
    found = [open_targets(place, job.text.train) for place in folders]
    return found[0] if draws == 1 else MixedTargets([(1 / draws, one) for one in found])


def control(job: Job) -> "Student":
    """The same student from random neurons, trained the same way: what the walk is worth."""
    from moe2dense.student.build import build_student

    settings = job.settings
    student = build_student(
        job.source, to=job.target, data=job.text.walk, init="random", config=settings.walk, seed=settings.seed
    )
    return train(job, student, "control") if job.plan.tokens else student
