"""MiniLLM's policy gradient (2306.08543) at each word that a student wrote, as rows that a loss can read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.distillation.targets.memory import HiddenTargets
from moe2dense.losses.teacher_rows import RowLoss, TeacherRows

# n tokens, N texts, S text length, V vocabulary


@dataclass
class PolicyRows:
    """rows: the teacher at n tokens; ids, log_q, weight, gain [n]: of the word written after each (see `gains`).

    The value is weight * divergence(the next word's whole distribution) - min(ratio * gain, clipped ratio * gain) with
    ratio = q / exp(log_q), as PPO (1707.06347); `clip` bounds it to 1 +- clip, 0 does not. Where the ratio is 1 its gradient is
    that of -gain * log q(word).
    """

    rows: TeacherRows
    ids: Tensor
    log_q: Tensor
    weight: Tensor
    gain: Tensor
    clip: float = 0.0

    @property
    def vocabulary(self) -> int | None:
        """How many ids the teacher gives a probability."""
        return self.rows.vocabulary

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, rows: TeacherRows, change: Callable[[Tensor], Tensor]) -> "PolicyRows":
        return PolicyRows(rows, *map(change, (self.ids, self.log_q, self.weight, self.gain)), clip=self.clip)

    def select(self, index: Tensor) -> "PolicyRows":
        """Return the rows of some tokens, index [m]."""
        return self._map(self.rows.select(index), lambda x: x[index])

    def to(self, device: torch.device) -> "PolicyRows":
        """Return the rows on another device."""
        return self._map(self.rows.to(device), lambda x: x.to(device))

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        """Return the two terms of one tile, given the student's log-probabilities."""
        divergence = self.rows.tile(rows, loss, temperature, dtype)
        ids = self.ids[rows]
        old, weight, gain = (x[rows].to(dtype) for x in (self.log_q, self.weight, self.gain))

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            q, index = log_q.exp(), ids[part][:, None]
            ratio = (log_q.gather(1, index)[:, 0] - old[part]).exp()
            value, grad = divergence(log_q, part)
            gained = clipped = ratio * gain[part]
            if self.clip:
                clipped = ratio.clamp(1 - self.clip, 1 + self.clip) * gain[part]
            slope = torch.where(gained <= clipped, gained, 0.0)[:, None]
            value = weight[part] * value - torch.minimum(gained, clipped)
            grad = grad.mul_(weight[part][:, None]).addcmul_(q, slope)
            return value, grad.scatter_add_(1, index, -slope)

        return value_and_gradient


def gains(reward: Tensor, written: Tensor, weight: Tensor, normalize: bool, baseline: bool) -> Tensor:
    """Return [N, S]: each written word's importance weight times the reward of the words after it; 0 for the last.

    reward [N, S]: log p(word) - log q(word); written [N, S] bool. normalize: the mean of those rewards, not their sum, so
    that early words of long texts do not outweigh the rest. baseline: subtract what the other texts earn from the same
    position on, on average. It does not depend on this word, so the expectation stays and the variance falls.
    """
    reward = reward * written
    later, count = (x.flip(1).cumsum(1).flip(1) - x for x in (reward, written.to(reward.dtype)))
    earned = later / count.clamp(min=1) if normalize else later
    if baseline:
        others = (written.sum(0) - 1).clamp(min=1)
        earned = earned - ((earned * written).sum(0) - earned) / others
    return weight * earned * written


@dataclass
class PolicyTargets:
    """The teacher on N texts and, [N, S], id, log q, weight and gain of the word after each token."""

    targets: HiddenTargets
    ids: Tensor
    log_q: Tensor
    weight: Tensor
    gain: Tensor
    clip: float

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "PolicyTargets":
        words = (x[rows] for x in (self.ids, self.log_q, self.weight, self.gain))
        return PolicyTargets(self.targets[rows], *words, clip=self.clip)

    def batch(self, indices: Sequence[int]) -> PolicyRows:
        """Return teacher and words at every position of some texts."""
        rows = list(indices)
        words = (x[rows].flatten() for x in (self.ids, self.log_q, self.weight, self.gain))
        return PolicyRows(self.targets.batch(rows), *words, clip=self.clip)


@torch.no_grad()
def teacher_log_p(targets: HiddenTargets, ids: Tensor, vocabulary: int) -> Tensor:
    """Return the teacher's log-probability of each token of ids, [N, S] float64; 0 for the first."""
    values = torch.zeros(ids.shape, dtype=torch.float64)
    for i in range(len(ids)):
        rows = targets.batch([i])
        dtype = torch.float64 if rows.hidden.dtype == torch.float64 else torch.float32
        log_p = rows.logits_of(slice(0, ids.shape[1] - 1), dtype)[:, :vocabulary].log_softmax(-1)
        index = ids[i, 1:].to(log_p.device).clamp(max=vocabulary - 1)  # ids beyond are in no word that was drawn
        values[i, 1:] = log_p.gather(1, index[:, None])[:, 0].double().cpu()
    return values
