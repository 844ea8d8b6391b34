"""On-policy distillation (GKD, 2306.13649): the student writes, the teacher gives its distribution at every word.

A share of the steps trains on the student's own continuations of the text's blocks, the others on the text. A window is
`rollout_steps` steps: at its start the student, as it is then, continues all blocks of its own steps, and the teacher reads
them together with the text of the other steps in one pass, without decoding. Continuations and the teacher's answers stay in
the run folder until a checkpoint lies behind their window.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import gather_rows, my_share, world
from moe2dense.config.schedules import scheduled
from moe2dense.config.training import RegimeConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.step import StepPlan
from moe2dense.distillation.targets.memory import HiddenTargets, hidden_targets
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.errors import UserError
from moe2dense.generation.in_memory import continued
from moe2dense.generation.sampling import Sampling
from moe2dense.modeling.kinds import BuiltStudent
from moe2dense.teacher.kinds import AnyTeacher, teacher_head
from moe2dense.weights.tensors import read_tensors

# n blocks of a window, S block length, H teacher hidden


def own_steps(share: str | float, steps: int) -> list[bool]:
    """Return for each step whether it is on the student's own words: as many, as evenly, as the scheduled share says."""
    own, before = [], 0.0
    for step in range(steps):
        after = before + scheduled(share, step, steps)
        own.append(math.floor(after + 1e-9) > math.floor(before + 1e-9))
        before = after
    return own


class WindowTargets(Targets, Protocol):
    """Targets of a window of steps, of which some blocks can be taken."""

    def __getitem__(self, rows: slice) -> Targets: ...


class OnPolicy(Regime):
    """Trains on the student's own words in a share of the steps, as the module describes."""

    name = "on-policy"
    brings_targets = always_new = True

    def __init__(self, teacher: AnyTeacher, options: RegimeConfig):
        self.teacher, self.options = teacher, options
        self.window: int | None = None

    @classmethod
    def create(
        cls, options: RegimeConfig, teacher: AnyTeacher | None, peer: BuiltStudent | PreTrainedModel | None
    ) -> Regime:
        """Make the regime for one run. Raises UserError without a teacher."""
        if teacher is None:
            raise UserError(f"the {cls.name} regime needs the teacher itself: stored targets know nothing of new text")
        return cls(teacher, options)

    def settings(self) -> dict[str, Any]:
        """Return the regime's options."""
        return asdict(self.options)

    def begin(self, run: RunView) -> None:
        """Settle which steps are on the student's own words. Raises UserError for padded blocks."""
        blocks = run.batches.blocks
        length = blocks.input_ids.shape[1]
        self.run, self.own = run, own_steps(self.options.share, run.steps)
        self.prompt = max(1, min(length - 1, round(self.options.prompt * length)))
        self.folder = None if run.folder is None else run.folder / "rollouts"
        eos = run.model.config.eos_token_id
        self.eos = {int(i) for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])}
        if blocks.attention_mask is not None and not bool(blocks.attention_mask.all()):
            raise UserError(f"data: the {self.name} regime continues blocks without padding; pack the text")

    def batches_for(self, step: int, batches: Batches, plan: StepPlan) -> tuple[Batches, StepPlan]:
        """Return the student's own words with the teacher's answers to them, or the text's, as the step's turn is."""
        size, per_step, own = self.options.rollout_steps, self.run.per_step, self.own[step]
        if self.window != step // size:
            self._open_window(step // size, batches.blocks)
        first = (step - step // size * size) * per_step
        rows = list(range(first, first + per_step))
        blocks = self._with_learnt_words(self.blocks[rows]) if own else batches.blocks[plan.indices]
        step_batches = Batches(blocks, self._targets_of(slice(first, first + per_step), own))
        alpha = 0.0 if own else plan.alpha  # its own words are no labels
        return step_batches, replace(plan, indices=list(range(per_step)), alpha=alpha)

    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Return whether the step was on the student's own words."""
        return {"own_words": float(self.own[step])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Forget the window: the next step opens its own again."""
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

    def _open_window(self, window: int, text: Blocks) -> None:
        """Get text and targets of a window of steps: read them where they were written before, else make them now."""
        size, per_step = self.options.rollout_steps, self.run.per_step
        steps = range(window * size, min((window + 1) * size, self.run.steps))
        indices = [step_blocks(len(text), per_step, s, self.run.seed) for s in steps]
        fixed = text[[i for step in indices for i in step]]
        own = [row for k, s in enumerate(steps) if self.own[s] for row in range(k * per_step, (k + 1) * per_step)]
        path = self._path(window)
        if path is not None and path.exists():
            rollouts = read_tensors(path, "remove it to have it written again")
            self.blocks = _with_ids(fixed, rollouts["input_ids"], own)
        else:
            rollouts = self._write_rollouts(fixed, own, steps.start * per_step)
            self.blocks = _with_ids(fixed, rollouts["input_ids"], own)
            rollouts |= self._teacher_answers()
            if path is not None and self.run.accelerator.is_main_process:
                atomic_write(path, save(rollouts))
        self.targets, self.window = self._window_targets(rollouts), window
        self._window_opened(own, rollouts)

    def _window_opened(self, own: list[int], rollouts: dict[str, Tensor]) -> None:
        """Use the window's blocks and targets; rollouts: what `_write_rollouts` gave for the rows `own`."""

    def _teacher_answers(self) -> dict[str, Tensor]:
        """Return what is kept of the teacher's answers on the window's text, by name."""
        return {"hidden": self._teacher_states()}

    def _window_targets(self, rollouts: dict[str, Tensor]) -> WindowTargets:
        """Take out of the window's records what `_teacher_answers` gave, as targets."""
        return HiddenTargets(rollouts.pop("hidden"), teacher_head(self.teacher))

    def _targets_of(self, rows: slice, own: bool) -> Targets:
        """Return the teacher's answers on some of the window's blocks."""
        return self.targets[rows]

    def _write_rollouts(self, fixed: Blocks, own: list[int], first: int) -> dict[str, Tensor]:
        """Return input_ids [n, S] of a window, the rows `own` continued by the student, and records of its words.

        Processes share the work.
        """
        mine = own[my_share(len(own))]
        ids = fixed.input_ids.clone()
        text, records = self._continue(ids[mine], [first + row for row in mine])
        ids[own] = gather_rows(text)
        rollouts = {"input_ids": ids}
        for name, values in records.items():
            rollouts[name] = torch.zeros(ids.shape, dtype=values.dtype)
            rollouts[name][own] = gather_rows(values)
        return rollouts

    def _sampling(self) -> Sampling:
        return Sampling(self.options.sample_temperature, self.options.top_p, seed=self.run.seed)

    def _continue(self, ids: Tensor, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ids [m, S] with the student's words, and records of each word, [m, S] by name."""
        return continued(self.run.model, ids, self.prompt, self._sampling(), numbers), {}

    def _teacher_states(self) -> Tensor:
        """Return the teacher's final hidden states [n, S, H] on the window's text, in one pass."""
        if len(self.blocks) < world()[1]:
            return hidden_targets(self.teacher, self.blocks).hidden
        return gather_rows(hidden_targets(self.teacher, self.blocks[my_share(len(self.blocks))]).hidden)

    def _learnt_words(self, blocks: Blocks, generated_only: bool = True) -> Tensor:
        """Return [N, S] bool: the student's own words that are learnt."""
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

    def _with_learnt_words(self, blocks: Blocks) -> Blocks:
        """Return the student's own words with the positions that carry loss: those that predict what it wrote."""
        learnt = self._learnt_words(blocks, self.options.generated_only)
        return Blocks(
            blocks.input_ids,
            blocks.domains,
            labels_mask=None if bool(learnt.all()) else learnt,
            prefix_mask=blocks.prefix_mask,
        )


def _with_ids(fixed: Blocks, ids: Tensor, own: list[int]) -> Blocks:
    """Return blocks with other tokens; the rows `own` are one document each."""
    documents = fixed.document_ids
    if documents is not None:
        documents = documents.clone()
        documents[own] = 0
    prefix = fixed.prefix_mask
    if prefix is not None:
        prefix = prefix & (ids == fixed.input_ids)  # of the rows `own` only the prompt is as it was
    return Blocks(ids, fixed.domains, None, documents, fixed.labels_mask, prefix_mask=prefix)
