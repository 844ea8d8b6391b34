"""On-policy distillation (GKD, 2306.13649): the student writes, the teacher says at every word what it would have written.

A share of the steps trains on the student's own continuations of the text's blocks, the others on the text. Every
`rollout_steps` steps the student, as it is then, continues all blocks of its steps to come, and the teacher reads those
together with the text of the steps in between in one pass: prefill only, so a streamed teacher serves it as a macro-batch.
What was written and what the teacher said of it stay in the run folder until a checkpoint has passed them.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import gather_rows, my_share, world
from moe2dense.config.schedules import scheduled
from moe2dense.config.schema import RegimeConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.step import Plan
from moe2dense.distillation.targets.memory import HiddenTargets, Targets, hidden_targets
from moe2dense.errors import UserError
from moe2dense.generation.in_memory import continued
from moe2dense.generation.sampling import Sampling
from moe2dense.modeling.head import model_head

# n blocks of a window, S block length, H teacher hidden


def own_steps(share: str | float, steps: int) -> list[bool]:
    """For each step of a run whether it is on the student's own words: as many, as evenly, as the scheduled share says."""
    found, before = [], 0.0
    for step in range(steps):
        after = before + scheduled(share, step, steps)
        found.append(math.floor(after + 1e-9) > math.floor(before + 1e-9))
        before = after
    return found


class OnPolicy(Regime):
    """See the module. `teacher`: a Teacher, streamed or resident, or a transformers model."""

    name = "on-policy"
    brings_targets = always_new = True

    def __init__(self, teacher: Any, options: RegimeConfig):
        if teacher is None:
            raise UserError(f"the {self.name} regime needs the teacher itself: stored targets know nothing of new text")
        self.teacher, self.options = teacher, options
        self.window: int | None = None

    def about(self) -> dict[str, Any]:
        return asdict(self.options)

    def begin(self, run: RunView) -> None:
        blocks = run.batches.blocks
        length = blocks.input_ids.shape[1]
        self.run, self.own = run, own_steps(self.options.share, run.steps)
        self.prompt = max(1, min(length - 1, round(self.options.prompt * length)))
        self.folder = None if run.folder is None else run.folder / "rollouts"
        self.eos = {int(i) for i in _ids(run.model.config.eos_token_id)}
        if blocks.attention_mask is not None and not bool(blocks.attention_mask.all()):
            raise UserError(f"data: the {self.name} regime continues blocks without padding; pack the text")

    def batches_for(self, step: int, batches: Batches, plan: Plan) -> tuple[Batches, Plan]:
        size = self.options.rollout_steps
        if self.window != step // size:
            self._open(step // size, batches.blocks)
        per_step = self.run.per_step
        first = (step - step // size * size) * per_step
        rows = list(range(first, first + per_step))
        blocks = self._as_learnt(self.blocks[rows]) if self.own[step] else batches.blocks[plan.indices]
        found = Batches(blocks, self._answers(slice(first, first + per_step), self.own[step]))
        alpha = 0.0 if self.own[step] else plan.alpha  # its own words are no labels
        return found, replace(plan, indices=list(range(per_step)), alpha=alpha)

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        return {"own_words": float(self.own[step])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.window = None

    def saved(self, step: int) -> None:
        """Drop the rollouts that no resumed run will ask for."""
        if self.folder is None or not self.run.accelerator.is_main_process:
            return
        for path in self.folder.glob("window-*.safetensors"):
            if int(path.stem.partition("-")[2]) < step // self.options.rollout_steps:
                path.unlink()

    def _path(self, window: int) -> Path | None:
        return None if self.folder is None else self.folder / f"window-{window:06d}.safetensors"

    def _open(self, window: int, text: Blocks) -> None:
        """Text and targets of a window of steps: read where they were written before, else made now."""
        size, per_step = self.options.rollout_steps, self.run.per_step
        steps = range(window * size, min((window + 1) * size, self.run.steps))
        indices = [step_blocks(len(text), per_step, s, self.run.seed) for s in steps]
        fixed = text[[i for step in indices for i in step]]
        own = [row for k, s in enumerate(steps) if self.own[s] for row in range(k * per_step, (k + 1) * per_step)]
        path = self._path(window)
        if path is not None and path.exists():
            kept = load_file(path)
            self.blocks = _with_ids(fixed, kept["input_ids"], own)
        else:
            kept = self._written(fixed, own, steps.start * per_step)
            self.blocks = _with_ids(fixed, kept["input_ids"], own)
            kept["hidden"] = self._scored()
            if path is not None and self.run.accelerator.is_main_process:
                atomic_write(path, save(kept))
        self.targets, self.window = HiddenTargets(kept.pop("hidden"), self._head()), window
        self._opened(own, kept)

    def _head(self) -> Any:
        return self.teacher.head if hasattr(self.teacher, "run") else model_head(self.teacher)

    def _opened(self, own: list[int], kept: dict[str, Tensor]) -> None:
        """The window's blocks and targets are there; kept: what else was noted while the rows `own` were written."""

    def _answers(self, rows: slice, own: bool) -> Targets:
        """What the teacher says of some of the window's blocks."""
        return self.targets[rows]

    def _written(self, fixed: Blocks, own: list[int], first: int) -> dict[str, Tensor]:
        """input_ids [n, S] of a window, those of the rows `own` continued by the student. Processes share the work."""
        mine = own[my_share(len(own))]
        ids = fixed.input_ids.clone()
        text, notes = self._continued(ids[mine], [first + row for row in mine])
        ids[own] = gather_rows(text)
        kept = {"input_ids": ids}
        for name, found in notes.items():
            kept[name] = torch.zeros(ids.shape, dtype=found.dtype)
            kept[name][own] = gather_rows(found)
        return kept

    def _sampling(self) -> Sampling:
        return Sampling(self.options.sample_temperature, self.options.top_p, seed=self.run.seed)

    def _continued(self, ids: Tensor, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [m, S] with the student's words, and what is to be remembered of them, [m, S] by name."""
        return continued(self.run.model, ids, self.prompt, self._sampling(), numbers), {}

    def _scored(self) -> Tensor:
        """The teacher's final hidden states [n, S, H] on the window's text, in one pass."""
        if len(self.blocks) < world()[1]:
            return hidden_targets(self.teacher, self.blocks).hidden
        return gather_rows(hidden_targets(self.teacher, self.blocks[my_share(len(self.blocks))]).hidden)

    def _words(self, blocks: Blocks, generated_only: bool = True) -> Tensor:
        """[N, S] bool: the student's own words that are learnt."""
        learnt = torch.ones_like(blocks.input_ids, dtype=torch.bool)
        if generated_only:
            learnt[:, : self.prompt] = False
        if blocks.labels_mask is not None:  # chats end where the student closes its turn; plain text goes on
            closed = torch.zeros_like(learnt)
            for i in self.eos:
                closed |= blocks.input_ids == i
            closed[:, : self.prompt] = False
            learnt &= closed.cumsum(1) - closed.long() == 0
        return learnt

    def _as_learnt(self, blocks: Blocks) -> Blocks:
        """The student's own words with the positions that carry loss: those that predict what it wrote."""
        learnt = self._words(blocks, self.options.generated_only)
        every = bool(learnt.all())
        return Blocks(blocks.input_ids, blocks.domains, labels_mask=None if every else learnt)


def _ids(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _with_ids(fixed: Blocks, ids: Tensor, own: list[int]) -> Blocks:
    """Blocks with other tokens; the rows `own` are one document each."""
    documents = fixed.document_ids
    if documents is not None:
        documents = documents.clone()
        documents[own] = 0
    return Blocks(ids, fixed.domains, None, documents, fixed.labels_mask)
