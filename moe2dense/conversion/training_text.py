"""What a run's settings change about its training text: passages that the teacher writes, and blocks that are chosen."""

import json
from dataclasses import replace

import torch

from moe2dense.common.devices import moved_to
from moe2dense.common.files import atomic_write
from moe2dense.common.processes import from_first
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.conversion.job import Job, Text
from moe2dense.conversion.results import Plan
from moe2dense.conversion.stages import training_targets
from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.load import load_blocks
from moe2dense.distillation.select_blocks import Selection, parse_selection, select_blocks
from moe2dense.errors import UserError
from moe2dense.generation.dataset import summary, write_text
from moe2dense.generation.prompts import read_prompts
from moe2dense.student.types import Student
from moe2dense.teacher.model import Teacher


def with_training_text(job: Job, student: Student) -> Job:
    """Return the job with what the teacher writes in its training text, and only the blocks that are chosen.

    A resumed run reads both back.
    """
    if job.settings.write.share or job.plan.extra:
        job = replace(job, text=replace(job.text, train=written_text(job)))
    selection = parse_selection(job.settings.train.select)
    return job if selection is None else _with_selected_blocks(job, student, selection)


def _with_selected_blocks(job: Job, student: Student, selection: Selection) -> Job:
    """The job with the most useful training blocks alone, seen so often that there are as many steps as on all of them."""
    blocks = job.text.train
    record = job.run.folder / "selection.json"
    targets = training_targets(job)
    assert targets is not None, (
        "needs_targets says so for train.select, and check_text_settings refuses regimes without"
    )
    if not job.run.finished("select"):

        def select() -> dict[str, float]:
            with moved_to(student.model, job.source.device):
                rows, divergence = select_blocks(student.model, targets, blocks, selection)
            atomic_write(record, json.dumps({"rows": rows, "divergence": [round(float(d), 6) for d in divergence]}))
            chosen, whole = float(divergence[rows].mean()), float(divergence.mean())
            return {"kept": len(rows), "of": len(blocks), "divergence": chosen, "divergence_of_all": whole}

        with job.timed("select") as entry:
            entry |= from_first(select)
    rows = json.loads(record.read_text())["rows"]
    train = replace(job.settings.train, epochs=job.settings.train.epochs * len(blocks) / len(rows))
    return replace(job, text=replace(job.text, train=blocks[rows]), settings=replace(job.settings, train=train))


def has_prompts(settings: RunConfig, plan: Plan, text: Text, teacher: Teacher) -> bool:
    """Return whether the training text has a record that the teacher can continue."""
    source, tokenizer = settings.data.path or DEFAULT_CORPUS, teacher.tokenizer()
    assert tokenizer is not None
    try:
        prompts = read_prompts(
            source, tokenizer, "train", settings.seed, settings.write.prompt_tokens, plan.block, text.options
        )
        return next(prompts, None) is not None
    except UserError:
        return False


def written_text(job: Job) -> Blocks:
    """Return the training blocks of a run, `write.share` of them and those of the plan's extra text written by its teacher, shuffled.

    The text is kept in the run's written/ and continued there by a resumed run. Raises UserError as `write_text` does, and when
    the written text fills no block.
    """
    settings, block = job.settings, job.plan.block
    real, folder = job.text.train, job.run.folder / "written"
    replaced, extra = round(settings.write.share * len(real)), round(job.plan.extra * len(real))
    wanted = replaced + extra
    if wanted < 1:
        raise UserError(
            f"write.share {settings.write.share:g} and write.extra {job.plan.extra:g} of {len(real)} blocks are less than one; raise them, or "
            f"--tokens"
        )
    tokenizer = job.teacher.tokenizer()
    if not job.run.finished("write"):
        with job.timed("write") as entry:
            source = settings.data.path or DEFAULT_CORPUS
            write_text(
                job.teacher, folder, source, settings.write, (wanted + 1) * block,
                block=block, seed=settings.seed, tokenizer=tokenizer, progress=job.progress, options=job.text.options,
                different=0 if replaced else len(real),
            )  # fmt: skip
            entry |= from_first(lambda: summary(folder))
    masks = settings.data.document_masks
    own = load_blocks(folder, tokenizer, block, "train", wanted * block, settings.seed, masks, options=job.text.options)
    job.run.save(written_blocks=len(own))
    parts = [real[: len(real) - replaced], own] if replaced < len(real) else [own]
    order = torch.randperm(sum(map(len, parts)), generator=torch.Generator().manual_seed(settings.seed))
    return join_blocks(parts, order)
