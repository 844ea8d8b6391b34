"""Sequence-level distillation (Kim and Rush, 1606.07947) in a run: the teacher writes part of the training text first."""

from typing import Any

import torch

from moe2dense.data import Blocks, join_blocks, load_blocks
from moe2dense.errors import UserError
from moe2dense.generation.dataset import summary, write_text
from moe2dense.planning import DEFAULT_CORPUS


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
