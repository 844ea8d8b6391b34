"""Progressive conversion: teacher -> larger student -> smaller student, each stage's student the next one's teacher.

Teacher assistants: Mirzadeh et al., 1902.03393. The tokens are divided among the stages, each with text of its own, so a
progressive run and a direct one cost the same number of positions. Every stage is a run folder of its own below out/stages.
"""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe2dense.common.processes import from_first
from moe2dense.conversion import stages
from moe2dense.conversion.choice import choose
from moe2dense.conversion.configure import CONFIG
from moe2dense.conversion.job import Job, Text
from moe2dense.conversion.planning import stage_targets
from moe2dense.conversion.run import open_run
from moe2dense.conversion.scoring import score
from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.student.build.cost import build_tokens
from moe2dense.student.locate import student_folder
from moe2dense.student.store import load_student
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import Student
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import Teacher


def last_stage(job: Job) -> Job:
    """Run every stage before the last and return the last one's job; the job itself where there is only one."""
    if not job.settings.stages:
        return job
    targets, intermediate_teacher = stage_targets(job.settings), None
    share = len(job.text.train) // len(targets)
    if share < 1:
        raise UserError(f"--stages {job.settings.stages}: the text has fewer blocks than stages; pass more --tokens")
    for i, target in enumerate(targets[:-1]):
        name = f"{i + 1}-{target.to.replace('%', 'pct').lower()}"
        intermediate_teacher = _run_stage(job, name, target, range(i * share, (i + 1) * share), intermediate_teacher)
    rest = range((len(targets) - 1) * share, len(job.text.train))
    return replace(job, text=_text(job, rest), intermediate_teacher=intermediate_teacher)


def direct(job: Job) -> Student:
    """Make the student of the last stage from the teacher at once, on the text of all stages: what the detour is worth."""
    target = stage_targets(job.settings)[-1]
    _run_stage(job, "direct", target, range(len(job.text.train)), None)
    return load_student(student_folder(str(job.run.folder / "stages" / "direct")))


def _text(job: Job, rows: range) -> Text:
    """The share of the training text that one stage sees, and its build's part of it."""
    train = job.text.train[list(rows)]
    settings = replace(job.settings, train=replace(job.settings.train, tokens=train.tokens))
    count = max(1, min(len(train), build_tokens(settings, job.plan.block, job.plan.target.width) // job.plan.block))
    return replace(job.text, train=train, build=train[[i * len(train) // count for i in range(count)]])


def _trained(stage: Job, built: Student) -> Student:
    """Train a stage's student; return it as it was closest to its teacher, and note which that was."""
    before = float(score(stage, built)["valid"].kl)
    stages.train(stage, built)
    trained = stage.run.finished("train-student")
    assert trained is not None, "training records what it did"
    choice = choose(before, trained)
    stage.run.save(choice=choice.to_dict())
    return load_student(student_folder(str(stage.run.folder)))


def _begun(folder: Path) -> bool:
    """Return whether a stage's run was begun; what is no run is removed."""
    begun = (folder / CONFIG).is_file()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    return begun


def _export(student: Student, folder: Path, tokenizer: str) -> None:
    """Write a stage's student as the next stage's teacher."""
    export(student, folder, tokenizer=tokenizer, dtype="float32", overwrite=True)


def _run_stage(job: Job, name: str, target: Target, rows: range, intermediate_teacher: Teacher | None) -> Teacher:
    """One stage in a run folder of its own, finished parts read back; returns its student as a teacher.

    As in a whole run, it is the built student where training brought it no closer to its teacher.
    """
    folder, text = job.run.folder / "stages" / name, _text(job, rows)
    train = replace(job.settings.train, tokens=text.train.tokens if job.plan.tokens else 0)
    settings = replace(job.settings, to=target.to, out=str(folder), mirror="", stages="", control=False, train=train)
    begun = from_first(lambda: _begun(folder))
    with ExitStack() as stack:
        run = stack.enter_context(open_run(folder, settings, resume=begun))
        run.after_change = job.run.after_change
        plan = replace(job.plan, target=target, tokens=train.tokens)
        stage = replace(
            job, run=run, settings=settings, plan=plan, text=text, intermediate_teacher=intermediate_teacher
        )
        if not run.finished("export"):
            student = stages.build(stage)
            if train.tokens:
                student = _trained(stage, student)
            with stage.timed("export"):
                tokenizer = str(job.teacher.path)
                from_first(partial(_export, student, folder / "model", tokenizer))
    teacher = job.settings.teacher
    return load_teacher(folder / "model", memory=teacher.memory, device=teacher.device, gpu_memory=teacher.gpu_memory)
