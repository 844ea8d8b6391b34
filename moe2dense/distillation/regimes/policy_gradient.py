"""MiniLLM (2306.08543): the reverse KL of whole texts, lowered by policy gradient on what the student writes.

The gradient is its two parts: at each word the reverse KL of the next word's distribution, exact over the vocabulary, and the word's
own log-probability times what the words after it earn, log p_teacher - log p_student each. Words may be drawn from a mixture with
the teacher's distribution; each carries the importance weight q / mixture of itself alone, the paper's approximation. The text's
own words are learnt in the steps between (the paper's language-modelling loss where train.alpha is 1).
"""

from typing import Any

import torch
from torch import Tensor

from moe2dense.config.schema import TrainConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import RunView
from moe2dense.distillation.regimes.on_policy import OnPolicy
from moe2dense.distillation.regimes.policy_rows import PolicyTargets, gains, teacher_log_p
from moe2dense.distillation.step import Plan
from moe2dense.distillation.targets.memory import HiddenTargets, Targets
from moe2dense.errors import UserError
from moe2dense.generation.in_memory import ROWS, ResidentDecoder, continued
from moe2dense.generation.mixed_sampling import Draws
from moe2dense.modeling.head import model_head
from moe2dense.teacher.decode import Decoder, sequences_that_fit

# n blocks of a window, S block length


def check_policy(train: TrainConfig) -> None:
    """Raises UserError for a loss that is not the sum of the regime's two terms."""
    if train.loss != "reverse_kl":
        raise UserError(
            f"the policy-gradient regime lowers reverse_kl; found train.loss {train.loss!r}: set it to that"
        )
    if train.temperature != 1.0 or train.temperature_schedule:
        raise UserError("the policy-gradient regime is of the student's own distribution; leave the temperature at 1")


class PolicyGradient(OnPolicy):
    """See the module. With `regime.teacher_mix` the teacher writes along, one pass over its weights for each word; else it only reads."""

    name = "policy-gradient"

    def begin(self, run: RunView) -> None:
        check_policy(run.config)
        super().begin(run)

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        found = super().after_step(step, batches, plan)
        return found | ({"reward": self.earned} if self.own[step] else {})

    def _continued(self, ids: Tensor, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        model, share = self.run.model, self.options.teacher_mix
        streamed, at_once = hasattr(self.teacher, "run"), ROWS
        if share and streamed:
            at_once = min(ROWS, sequences_that_fit(self.teacher, ids.shape[1]))
        rows, length = ids.shape
        beside = self._beside if share else None
        draws = Draws(rows, length, self._sampling(), self._vocabulary(), beside, share)
        training = getattr(self.teacher, "training", False)
        if training:
            self.teacher.eval()
        text = continued(model, ids, self.prompt, self._sampling(), numbers, draws=draws, at_once=at_once)
        if training:
            self.teacher.train()
        return text, {"log_q": draws.log_q, "log_b": draws.log_b}

    def _beside(self, text: Tensor) -> Any:
        """The teacher as it writes along, see `Draws`."""
        return (
            Decoder(self.teacher, text.tolist())
            if hasattr(self.teacher, "run")
            else ResidentDecoder(self.teacher, text)
        )

    def _vocabulary(self) -> int:
        """How many ids both know."""
        return min(len(self._head().weight), len(model_head(self.run.model).weight))

    def _opened(self, own: list[int], kept: dict[str, Tensor]) -> None:
        """What each word of the rows `own` earned, at the position that predicts it."""
        options, ids = self.options, self.blocks.input_ids
        reward = torch.zeros(ids.shape, dtype=torch.float64)
        written = torch.zeros_like(ids, dtype=torch.bool)
        if own:
            targets = HiddenTargets(self.targets.hidden[own], self.targets.head)
            reward[own] = teacher_log_p(targets, ids[own], self._vocabulary())
            written[own] = self._words(self.blocks[own])
        reward = (reward - kept["log_q"]) * written
        weight = torch.where(written, (kept["log_q"] - kept["log_b"]).exp(), 1.0)
        gain = gains(reward, written, weight, options.normalize, options.baseline)
        known = (ids, kept["log_q"], weight, gain)
        self.policy = PolicyTargets(self.targets, *(x.roll(-1, 1) for x in known), clip=options.ratio_clip)
        self.reward, self.written = weight * reward, written

    def _answers(self, rows: slice, own: bool) -> Targets:
        if not own:
            return super()._answers(rows, own)
        self.earned = float(self.reward[rows].sum() / self.written[rows].sum().clamp(min=1))
        return self.policy[rows]
