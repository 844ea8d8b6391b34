"""The job that the stages of a conversion share: settings, plan, teacher and text."""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.common.costs import Cost, cost_of_all
from moe2dense.common.counters import metered
from moe2dense.common.processes import gather_objects
from moe2dense.common.progress import Report
from moe2dense.common.units import show_count
from moe2dense.config.schema import DEFAULT_CORPUS, RunConfig
from moe2dense.conversion.results import Plan
from moe2dense.conversion.run import Run
from moe2dense.conversion.text_options import text_options
from moe2dense.data.blocks import Blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.frequency import count_tokens
from moe2dense.data.load import load_blocks
from moe2dense.data.options import DEFAULTS, TextOptions
from moe2dense.data.records import is_single_file
from moe2dense.distillation.targets.captured.rows import is_captured
from moe2dense.distillation.targets.captured.targets import captured_text
from moe2dense.evaluation.reference import Reference
from moe2dense.families.machines import peak_of
from moe2dense.student.dense_teacher import target_from
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.model import Teacher


@dataclass(frozen=True)
class Text:
    """The blocks of a run: the build's are some of the training blocks.

    token_counts [V]: how often each token id occurs in the training text as it was given, which says what is rare. options: how
    it was read; records: what was read and skipped of train, valid and ood.
    """

    train: Blocks
    valid: Blocks
    ood: Blocks | None
    build: Blocks
    token_counts: Tensor | None = None
    options: TextOptions = DEFAULTS
    records: dict[str, TextCounts] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What every stage needs. A stage that changes the text or the settings returns another job."""

    run: Run
    settings: RunConfig
    plan: Plan
    teacher: Teacher
    text: Text
    progress: Report
    references: dict[str, Reference] = field(default_factory=dict)
    # What the student is made from where that is not the teacher: the student of the stage before.
    intermediate_teacher: Teacher | None = None

    @property
    def source(self) -> Teacher:
        """The model whose layers and targets make the student."""
        return self.teacher if self.intermediate_teacher is None else self.intermediate_teacher

    @property
    def target(self) -> Target:
        """The student's shape, as it is copied from the source."""
        return target_from(self.source, self.plan.target)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Record a stage as finished, with its seconds and whatever the body puts into the entry."""
        entry: dict[str, Any] = {}
        start = time.perf_counter()
        with self.metered(stage):
            yield entry
        self.run.finish(stage, seconds=round(time.perf_counter() - start, 2), **entry)

    @contextlib.contextmanager
    def metered(self, stage: str) -> Iterator[None]:
        """Add what the body costs to the run's record of a stage, and to no stage around it.

        Processes that have joined must all come here; the cost is that of all.
        """
        self.run.inner_costs.append(Cost())
        cost, ended = Cost(), False
        try:
            with metered() as cost:
                yield
            ended = True
        finally:
            inner = self.run.inner_costs.pop()
            own = replace(cost - inner, peak=_peak(self.source.device))
            # where this process was stopped, others may never come here: waiting for them could take for ever
            self.run.spend(stage, cost_of_all(gather_objects(own)) if ended else own)
            if self.run.inner_costs:
                self.run.inner_costs[-1] += cost


@functools.cache
def _peak(device: torch.device) -> float:
    """Return the FLOP/s that a device is sold with, 0 where that is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def load_text(settings: RunConfig, plan: Plan, tokenizer: PreTrainedTokenizerBase, day: str = "") -> Text:
    """Load the blocks of the run, which began on `day`: what chat templates with a date are told.

    Raises UserError for text that is missing, empty or shorter than one block.
    """
    options, records = text_options(settings.data, day), {s: TextCounts() for s in ("train", "valid", "ood")}

    def load(split: str, tokens: int) -> Blocks:
        return load_split(settings, split, tokenizer, plan.block, tokens, options, records[split])

    wanted = max(plan.tokens, plan.build_tokens)
    scored = plan.held_out * plan.block
    train = _captured(settings, plan.block, wanted) or load("train", wanted)
    valid = load("valid", scored)
    ood = load("ood", scored) if settings.data.ood else None
    count = max(1, min(len(train), plan.build_tokens // plan.block))
    spread = [i * len(train) // count for i in range(count)]  # over many passages: worth more than any setting
    counted = count_tokens(train, plan.shape.vocab_size)
    records = {split: counts for split, counts in records.items() if counts.read}
    return Text(train, valid, ood, train[spread], counted, options, records)


def _captured(settings: RunConfig, block: int, tokens: int) -> Blocks | None:
    """Return the training text where train.targets is a set that others captured, which is its own text; else None."""
    folder = settings.train.targets
    return captured_text(folder, block, tokens).blocks if folder and is_captured(folder) else None


def load_split(
    settings: RunConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    tokens: int,
    options: TextOptions,
    counts: TextCounts,
) -> Blocks:
    """Load blocks of the train, valid or ood text that a run's settings name. Raises UserError as `load_text`.

    Held-out text is spread over as many passages as there are.
    """
    path, name = split_source(settings, split)
    return load_blocks(
        path,
        tokenizer,
        block,
        name,
        tokens=tokens,
        seed=settings.seed,
        document_masks=settings.data.document_masks,
        spread=split != "train",
        options=options,
        counts=counts,
    )


def split_source(settings: RunConfig, split: str) -> tuple[str, str]:
    """Return where the train, valid or ood text of a run comes from, and which split of it.

    A file given for one purpose is used as it stands; a folder or hub dataset has a split for it.
    """
    data = settings.data
    own = {"train": "", "valid": data.valid, "ood": data.ood}[split]
    return own or data.path or DEFAULT_CORPUS, "all" if own and is_single_file(own) else split


def shortfall(text: Text, plan: Plan) -> str:
    """Return a sentence when the data holds noticeably fewer tokens than asked for, else ''."""
    wanted, there = max(plan.tokens, plan.build_tokens), text.train.tokens
    if there >= 0.9 * wanted:
        return ""
    return f"the data has {show_count(there)} tokens for training, {show_count(wanted)} were asked for; all of them are used"
