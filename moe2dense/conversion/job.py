"""The job that the stages of a conversion share: settings, plan, teacher and text."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2dense.common.units import show_count
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.conversion.results import Plan
from moe2dense.conversion.run import Run

if TYPE_CHECKING:
    from moe2dense.data.blocks import Blocks
    from moe2dense.evaluation.reference import Reference
    from moe2dense.student.target.resolve import Target


@dataclass
class Text:
    """The blocks of a run: the build's are the first of the training blocks."""

    train: "Blocks"
    valid: "Blocks"
    ood: "Blocks | None"
    build: "Blocks"


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
    intermediate_teacher: Any = (
        None  # what the student is made from where that is not the teacher: the student of the stage before
    )

    @property
    def source(self) -> Any:
        """Whose layers and targets make the student."""
        return self.teacher if self.intermediate_teacher is None else self.intermediate_teacher

    @property
    def target(self) -> "Target":
        """The student's shape, as it is copied from the source."""
        from moe2dense.student.dense_teacher import target_from

        return target_from(self.source, self.plan.target)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Record a stage as finished, with its seconds and whatever the body puts into the entry."""
        entry: dict[str, Any] = {}
        start = time.perf_counter()
        yield entry
        self.run.finish(stage, seconds=round(time.perf_counter() - start, 2), **entry)


def load_text(settings: RunConfig, plan: Plan, tokenizer: Any) -> Text:
    """The blocks of the run. Raises UserError for text that is missing, empty or shorter than one block."""
    from moe2dense.data.load import load_blocks

    data, block = settings.data, plan.block
    source = data.path or DEFAULT_CORPUS
    options = {"seed": settings.seed, "document_masks": data.document_masks}
    wanted = max(plan.tokens, plan.build_tokens)
    train = load_blocks(source, tokenizer, block, "train", tokens=wanted, **options)
    held = data.eval_blocks * block
    own = _split_of(data.valid, "valid") if data.valid else "valid"
    valid = load_blocks(data.valid or source, tokenizer, block, own, tokens=held, **options)
    ood = (
        load_blocks(data.ood, tokenizer, block, _split_of(data.ood, "ood"), tokens=held, **options)
        if data.ood
        else None
    )
    count = max(1, min(len(train), plan.build_tokens // block))
    spread = [i * len(train) // count for i in range(count)]  # over many passages: worth more than any setting
    return Text(train, valid, ood, train[spread])


def shortfall(text: Text, plan: Plan) -> str:
    """A sentence when the data holds noticeably fewer tokens than asked for, else ''."""
    wanted, found = max(plan.tokens, plan.build_tokens), text.train.tokens
    if found >= 0.9 * wanted:
        return ""
    return f"the data has {show_count(found)} tokens for training, {show_count(wanted)} were asked for; all of them are used"


def _split_of(path: str, split: str) -> str:
    """A file given for one purpose is used as it stands; a folder or hub dataset has a split for it."""
    return "all" if Path(path).is_file() else split
