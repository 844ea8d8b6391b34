"""MiniLLM (2306.08543): the reverse KL of whole texts, lowered by policy gradient on what the student writes.

The gradient has two parts: at each word the reverse KL of the next word's distribution, exact over the vocabulary, and the word's
own log-probability times the rewards of the words after it, log p_teacher - log p_student each. Words may be drawn from a mixture
with the teacher's distribution; each carries the importance weight q / mixture of itself alone, the paper's approximation. The
steps between are on the text's own words (the paper's language-modelling loss where train.alpha is 1).
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import RunView
from moe2dense.distillation.regimes.checks import check_policy
from moe2dense.distillation.regimes.on_policy import OnPolicy
from moe2dense.distillation.regimes.policy_rows import PolicyTargets, gains, teacher_log_p
from moe2dense.distillation.step import StepPlan
from moe2dense.distillation.targets.memory import HiddenTargets
from moe2dense.distillation.targets.protocols import Targets
from moe2dense.generation.decoders import decoder_for
from moe2dense.generation.in_memory import ROWS_AT_ONCE, continued
from moe2dense.generation.mixed_sampling import MixedSampler
from moe2dense.modeling.forward import evaluation_mode
from moe2dense.modeling.head import model_head
from moe2dense.teacher.decode import sequences_that_fit
from moe2dense.teacher.kinds import teacher_head
from moe2dense.teacher.model import Teacher

# n blocks of a window, S block length


class PolicyGradient(OnPolicy):
    """Adds the reward of whole texts to on-policy distillation, as the module describes.

    With `regime.teacher_mix` the teacher writes too, one pass over its weights for each word; else it only reads.
    """

    name = "policy-gradient"

    def begin(self, run: RunView) -> None:
        """Check the run's loss and begin. Raises UserError for a loss that is not reverse_kl."""
        check_policy(run.config)
        super().begin(run)

    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Return the mean reward of a word, where the step was on the student's own."""
        return super().after_step(step, batches, plan) | ({"reward": self.mean_reward} if self.own[step] else {})

    def _continue(self, ids: Tensor, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ids [m, S] with words drawn from the mixture, and each word's log-probabilities (see `MixedSampler`)."""
        model, teacher, share = self.run.model, self.teacher, self.options.teacher_mix
        (rows, length), at_once = ids.shape, ROWS_AT_ONCE
        if share and isinstance(teacher, Teacher):
            at_once = min(at_once, sequences_that_fit(teacher, length))
        open_decoder = partial(decoder_for, teacher) if share else None
        sampler = MixedSampler(rows, length, self._sampling(), self._shared_vocabulary(), open_decoder, share)
        with nullcontext() if isinstance(teacher, Teacher) else evaluation_mode(teacher):
            text = continued(model, ids, self.prompt, self._sampling(), numbers, sampler=sampler, at_once=at_once)
        return text, {"log_q": sampler.log_q, "log_b": sampler.log_b}

    def _shared_vocabulary(self) -> int:
        """Return how many ids both models know."""
        return min(len(teacher_head(self.teacher).weight), len(model_head(self.run.model).weight))

    def _window_opened(self, own: list[int], rollouts: dict[str, Tensor]) -> None:
        """Compute the reward of each word of the rows `own`, at the position that predicts it."""
        options, ids, log_q = self.options, self.blocks.input_ids, rollouts["log_q"]
        assert isinstance(self.targets, HiddenTargets), "a teacher that is here gives its hidden states"
        reward = torch.zeros(ids.shape, dtype=torch.float64)
        written = torch.zeros_like(ids, dtype=torch.bool)
        if own:
            targets = HiddenTargets(self.targets.hidden[own], self.targets.head)
            reward[own] = teacher_log_p(targets, ids[own], self._shared_vocabulary())
            written[own] = self._learnt_words(self.blocks[own])
        reward = (reward - log_q) * written
        weight = torch.where(written, (log_q - rollouts["log_b"]).exp(), 1.0)
        gain = gains(reward, written, weight, options.normalize, options.baseline)
        following = (x.roll(-1, 1) for x in (ids, log_q, weight, gain))  # of the word after each position
        self.policy = PolicyTargets(self.targets, *following, clip=options.ratio_clip)
        self.reward, self.written = weight * reward, written

    def _targets_of(self, rows: slice, own: bool) -> Targets:
        """Return the teacher's answers on some of the window's blocks, with the rewards where the student wrote them."""
        if not own:
            return super()._targets_of(rows, own)
        self.mean_reward = float(self.reward[rows].sum() / self.written[rows].sum().clamp(min=1))
        return self.policy[rows]
