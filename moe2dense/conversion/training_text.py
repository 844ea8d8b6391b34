"""What a run's settings change about its text and about the teacher that its student learns from."""

import dataclasses
import json
from typing import Any

import torch

from moe2dense.common.files import atomic_write
from moe2dense.config.schema import DEFAULT_CORPUS
from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.load import load_blocks
from moe2dense.distillation.select_blocks import parse_selection, select_blocks
from moe2dense.errors import UserError
from moe2dense.generation.dataset import summary, write_text


def prepare_text(job: Any, student: Any) -> None:
    """Put what the teacher writes into the training text, then keep the blocks that are chosen; a resumed run reads both back."""
    if job.settings.write.share:
        job.text = dataclasses.replace(job.text, train=written_text(job))
    if job.settings.train.select:
        _select(job, student)


def _select(job: Any, student: Any) -> None:
    from moe2dense.conversion.stages import training_targets

    whole, selection = job.text.train, parse_selection(job.settings.train.select)
    assert selection is not None
    record = job.run.folder / "selection.json"
    targets = training_targets(job)
    if not job.run.finished("select"):
        with job.timed("select") as entry:
            rows, divergence = select_blocks(student.model, targets, whole, selection)
            entry |= {"kept": len(rows), "of": len(whole), "divergence": float(divergence[rows].mean())}
            entry["divergence_of_all"] = float(divergence.mean())
            atomic_write(record, json.dumps({"rows": rows, "divergence": [round(float(d), 6) for d in divergence]}))
    rows = json.loads(record.read_text())["rows"]
    job.text = dataclasses.replace(job.text, train=whole[rows])
    train = dataclasses.replace(job.settings.train, epochs=job.settings.train.epochs * len(whole) / len(rows))
    job.settings = dataclasses.replace(job.settings, train=train)  # as many steps as on the whole text


def written_text(job: Any) -> Blocks:
    """The training blocks of a run, `write.share` of them written by its teacher, in a shuffled order.

    The text is kept in the run's written/ and continued there by a resumed run. Raises UserError as `write_text` does, and when
    the written text fills no block.
    """
    settings, block = job.settings, job.plan.block
    real, folder = job.text.train, job.run.folder / "written"
    wanted = round(settings.write.share * len(real))
    if wanted < 1:
        raise UserError(
            f"write.share {settings.write.share:g} of {len(real)} blocks is less than one; raise it, or --tokens"
        )
    tokenizer = job.teacher.tokenizer()
    if not job.run.finished("write"):
        with job.timed("write") as entry:
            source = settings.data.path or DEFAULT_CORPUS
            write_text(
                job.teacher, folder, source, settings.write, (wanted + 1) * block,
                block=block, seed=settings.seed, tokenizer=tokenizer, progress=job.progress,
            )  # fmt: skip
            entry |= summary(folder)
    masks = settings.data.document_masks
    own = load_blocks(folder, tokenizer, block, "train", wanted * block, settings.seed, masks)
    together = join_blocks([real[: len(real) - wanted], own]) if wanted < len(real) else own
    return together[torch.randperm(len(together), generator=torch.Generator().manual_seed(settings.seed))]
