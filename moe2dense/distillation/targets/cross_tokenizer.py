"""Targets of a teacher with another tokenizer, compared where both have read the same characters.

uld      sorted probabilities against sorted probabilities: the Wasserstein distance where all tokens are equally far apart
         (Universal Logit Distillation, 2402.12030, which pairs positions by their number; here they are paired by characters)
aligned  KL over the tokens that both vocabularies spell alike, everything else being one bucket
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.data.options import document_prefix
from moe2dense.data.records import passages
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import RowLoss, TopKRows
from moe2dense.modeling.head import OutputHead
from moe2dense.teacher.model import Teacher

# n student positions, r rows of a tile, V student vocabulary, W teacher vocabulary, K shared tokens, H teacher hidden

CROSS_TOKENIZER_LOSSES = ("uld", "aligned")


def common_boundaries(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """Return (i, j) for every character that ends token i of one and token j of the other, both ascending.

    student, teacher: where each token ends. Empty tokens do not count.
    """
    place = {end: j for j, end in enumerate(teacher) if end > (teacher[j - 1] if j else 0)}
    return [(i, place[end]) for i, end in enumerate(student) if end > (student[i - 1] if i else 0) and end in place]


def shared_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return (student ids [K], teacher ids [K]) of tokens spelt alike, and of the end of text.

    Tokenizers have different signs for a space; all are taken as one.
    """

    def spelt(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        special = set(tokenizer.all_special_ids)
        return {t.replace("Ġ", " ").replace("▁", " "): i for t, i in tokenizer.get_vocab().items() if i not in special}

    own, other = spelt(student), spelt(teacher)
    words = sorted(own.keys() & other.keys())
    ends = student.eos_token_id, teacher.eos_token_id
    return torch.tensor([own[w] for w in words] + [ends[0]]), torch.tensor([other[w] for w in words] + [ends[1]])


def uld(p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum_i |p_(i) - q_(i)| [r], its gradient with respect to q's logits [r, V]).

    p [r, W] and log_q [r, V] need not be sorted; the sum is over sorted ones.
    """
    q = log_q.exp()
    a = p.sort(-1, descending=True).values
    b, order = q.sort(-1, descending=True)
    size = max(a.shape[1], b.shape[1])
    gap = pad(b, (0, size - b.shape[1])) - pad(a, (0, size - a.shape[1]))
    sign = torch.zeros_like(q).scatter_(1, order, gap[:, : b.shape[1]].sign())
    return gap.abs().sum(-1), q * (sign - (q * sign).sum(-1, keepdim=True))


@dataclass
class CrossRows:
    """The teacher at n student positions.

    hidden [n, H]; known [n]: whether it has read the same characters there; loss: one of CROSS_TOKENIZER_LOSSES; shared: ids
    of tokens spelt alike; weight: of the known positions.
    """

    hidden: Tensor
    known: Tensor
    head: OutputHead
    loss: str
    shared: tuple[Tensor, Tensor]
    weight: float

    @property
    def vocabulary(self) -> int | None:
        """Unknown: the teacher's ids are not the student's."""
        return None

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, index: Tensor) -> "CrossRows":
        """Return the rows of some positions, index [m]."""
        return replace(self, hidden=self.hidden[index], known=self.known[index])

    def to(self, device: torch.device) -> "CrossRows":
        """Return the rows on another device; the head stays on its own."""
        shared = (self.shared[0].to(device), self.shared[1].to(device))
        return replace(self, hidden=self.hidden.to(device), known=self.known.to(device), shared=shared)

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        """Return the loss of one tile, given the student's log-probabilities at `temperature`."""
        if loss != "forward_kl":
            raise UserError(f"--cross-tokenizer {self.loss} brings its own loss; leave --loss out, found {loss!r}")
        logits = self.head.logits(self.hidden[rows]).to(self.hidden.device, dtype) / temperature
        known = self.known[rows].to(dtype) * self.weight
        log_p = logits.log_softmax(-1)

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            if self.loss == "uld":
                value, grad = uld(log_p[part].exp(), log_q)
            else:
                ids = self.shared[0].expand(len(log_q), -1)
                aligned = TopKRows(ids, log_p[part][:, self.shared[1]].clamp(min=-1e4), temperature=temperature)
                value, grad = aligned.tile(slice(None), loss, temperature, dtype)(log_q, slice(None))
            return value * known[part], grad * known[part][:, None]

        return value_and_gradient


@dataclass
class CrossTargets:
    """A teacher's final hidden states [N, T, H] on its own tokens of N texts.

    place [N, S]: for each student position its place in them, -1 where there is none; share: of the real student positions that
    have one; loss and shared: see `CrossRows`.
    """

    hidden: Tensor
    place: Tensor
    head: OutputHead
    loss: str
    shared: tuple[Tensor, Tensor]
    share: float

    def __len__(self) -> int:
        return len(self.place)

    def batch(self, indices: Sequence[int]) -> CrossRows:
        """Return the teacher at every student position of some texts."""
        rows = list(indices)
        place = self.place[rows]
        width = self.hidden.shape[-1]
        hidden = self.hidden[rows].gather(1, place.clamp(min=0)[..., None].expand(-1, -1, width))
        weight = 1 / max(self.share, 1e-12)
        return CrossRows(hidden.flatten(0, 1), (place >= 0).flatten(), self.head, self.loss, self.shared, weight)


@dataclass
class _Stretch:
    """One stretch of text in both tokenizers: ids, and the pairs of positions that end at the same character."""

    student: list[int]
    teacher: list[int]
    places: list[tuple[int, int]]


def _stretches(
    text: str, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, block: int, longest: int
) -> list[_Stretch]:
    """Cut a text into stretches of at most `block` student tokens and `longest` teacher tokens, each beginning as a document does."""
    before = document_prefix(student), document_prefix(teacher)
    step = max(1, block - len(before[0]))
    offsets = student(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    stretches = []
    for start in range(0, len(offsets), step):
        part = text[offsets[start][0] : offsets[min(start + step, len(offsets)) - 1][1]]
        own = student(part, add_special_tokens=False, return_offsets_mapping=True)
        other = teacher(part, add_special_tokens=False, return_offsets_mapping=True)
        ids = [*before[0], *own["input_ids"]][:block], [*before[1], *other["input_ids"]][:longest]
        # What stands before a text (BOS) ends where the text begins, and so at no character.
        ends = tuple(
            ([0] * len(prefix) + [e for _, e in out["offset_mapping"]])[:most]
            for prefix, out, most in zip(before, (own, other), (block, longest), strict=True)
        )
        if len(ends[0]) > len(before[0]) + 1 and len(ends[1]) > len(before[1]):
            begin = [(len(before[0]) - 1, len(before[1]) - 1)] if all(before) else []
            stretches.append(_Stretch(*ids, begin + common_boundaries(*ends)))
    return stretches


def _read_stretches(
    data: str | Path,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    block: int,
    longest: int,
    tokens: int,
    seed: int,
) -> list[_Stretch]:
    """Read about `tokens` student tokens of the training text."""
    stretches, count = [], 0
    for row in passages(data, "train", seed):
        for stretch in _stretches(str(row.get("text") or ""), student, teacher, block, longest):
            stretches.append(stretch)
            count += len(stretch.student)
        if count >= tokens:
            break
    return stretches


def cross_targets(
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    block: int,
    tokens: int,
    loss: str,
    seed: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Blocks, CrossTargets]:
    """Return (student blocks, the teacher's answers at them) on about `tokens` tokens of the training text.

    Blocks are padded on the right. tokenizer: the student's; teacher_tokenizer: by default the teacher's own. Raises
    UserError for an unknown loss, and where the two tokenizers share no boundary or no token.
    """
    if loss not in CROSS_TOKENIZER_LOSSES:
        raise UserError(f"--cross-tokenizer must be text, {' or '.join(CROSS_TOKENIZER_LOSSES)}; found {loss!r}")
    other = teacher_tokenizer or teacher.tokenizer()
    positions = getattr(teacher.config.get_text_config(), "max_position_embeddings", 4 * block)
    longest = min(positions, 4 * block)
    stretches = _read_stretches(data, tokenizer, other, block, longest, tokens, seed)
    if not any(s.places for s in stretches):
        raise UserError(f"data {str(data)!r} has no text at which the two tokenizers meet; use --cross-tokenizer text")
    ids, mask = right_padded([s.student for s in stretches], block)
    teacher_ids, teacher_mask = right_padded([s.teacher for s in stretches])
    place = torch.full(ids.shape, -1)
    for i, stretch in enumerate(stretches):
        for student_position, teacher_position in stretch.places:
            place[i, student_position] = teacher_position
    hidden = teacher.run(teacher_ids, teacher_mask.long(), logits=False).hidden_states
    share = float((place >= 0).sum() / mask.sum())
    shared = shared_tokens(tokenizer, other)
    return Blocks(ids, attention_mask=mask), CrossTargets(hidden, place, teacher.head, loss, shared, share)
