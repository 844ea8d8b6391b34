"""Distributions of a teacher with another tokenizer, compared where both tokenizers have read the same characters.

uld      sorted probabilities against sorted probabilities: the Wasserstein distance when every token is equally far from every other
         (Universal Logit Distillation, 2402.12030, which pairs positions by their number; here they are paired by characters)
aligned  KL over the tokens that both vocabularies spell alike, everything else being one bucket
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.data.records import passages
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import RowLoss, TopKRows

# n student positions, r rows of a tile, V student vocabulary, W teacher vocabulary, K shared tokens, H teacher hidden

FORMS = ("uld", "aligned")


def common_boundaries(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """(i, j) for every character that ends token i of one and token j of the other; both ascending. Empty tokens do not count."""
    place = {end: j for j, end in enumerate(teacher) if end > (teacher[j - 1] if j else 0)}
    return [(i, place[end]) for i, end in enumerate(student) if end > (student[i - 1] if i else 0) and end in place]


def shared_tokens(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """(student ids [K], teacher ids [K]) of tokens spelt alike, whatever sign stands for a space; the end-of-text tokens among them."""

    def spelt(tokenizer: Any) -> dict[str, int]:
        special = set(tokenizer.all_special_ids)
        return {t.replace("Ġ", " ").replace("▁", " "): i for t, i in tokenizer.get_vocab().items() if i not in special}

    own, other = spelt(student), spelt(teacher)
    pairs = [(own[t], other[t]) for t in sorted(own.keys() & other.keys())]
    pairs.append((student.eos_token_id, teacher.eos_token_id))
    ids = torch.tensor(pairs)
    return ids[:, 0], ids[:, 1]


def uld(p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_i |p_(i) - q_(i)| [r], its gradient with respect to q's logits [r, V]); p [r, W] and log_q [r, V], sorted inside."""
    q = log_q.exp()
    a = p.sort(-1, descending=True).values
    b, order = q.sort(-1, descending=True)
    size = max(a.shape[1], b.shape[1])
    gap = pad(b, (0, size - b.shape[1])) - pad(a, (0, size - a.shape[1]))
    sign = torch.zeros_like(q).scatter_(1, order, gap[:, : b.shape[1]].sign())
    return gap.abs().sum(-1), q * (sign - (q * sign).sum(-1, keepdim=True))


@dataclass
class CrossRows:
    """The teacher at n student positions: hidden [n, H], `known` [n] where it has read the same characters; weight: of those."""

    hidden: Tensor
    known: Tensor
    head: Any
    form: str
    shared: tuple[Tensor, Tensor]
    weight: float

    @property
    def vocabulary(self) -> int | None:
        return None

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, index: Tensor) -> "CrossRows":
        return replace(self, hidden=self.hidden[index], known=self.known[index])

    def to(self, device: torch.device) -> "CrossRows":
        shared = (self.shared[0].to(device), self.shared[1].to(device))
        return replace(self, hidden=self.hidden.to(device), known=self.known.to(device), shared=shared)

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        if loss != "forward_kl":
            raise UserError(f"--cross-tokenizer {self.form} brings its own loss; leave --loss out, found {loss!r}")
        logits = self.head.logits(self.hidden[rows]).to(self.hidden.device, dtype) / temperature
        known = self.known[rows].to(dtype) * self.weight
        log_p = logits.log_softmax(-1)

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            if self.form == "uld":
                value, grad = uld(log_p[part].exp(), log_q)
            else:
                ids = self.shared[0].expand(len(log_q), -1)
                kept = TopKRows(ids, log_p[part][:, self.shared[1]].clamp(min=-1e4), temperature=temperature)
                value, grad = kept.tile(slice(None), loss, temperature, dtype)(log_q, slice(None))
            return value * known[part], grad * known[part][:, None]

        return value_and_gradient


@dataclass
class CrossTargets:
    """A teacher's final hidden states [N, T, H] on its own tokens of N texts, and for each student position its place there (-1: none)."""

    hidden: Tensor
    place: Tensor  # [N, S]
    head: Any
    form: str
    shared: tuple[Tensor, Tensor]
    share: float  # of the real student positions that have a place

    def __len__(self) -> int:
        return len(self.place)

    def batch(self, indices: Sequence[int]) -> CrossRows:
        rows = list(indices)
        place = self.place[rows]
        width = self.hidden.shape[-1]
        found = self.hidden[rows].gather(1, place.clamp(min=0)[..., None].expand(-1, -1, width))
        return CrossRows(
            found.flatten(0, 1), (place >= 0).flatten(), self.head, self.form, self.shared, 1 / max(self.share, 1e-12)
        )


@dataclass
class _Pair:
    """One stretch of text in both tokenizers."""

    student: list[int]
    teacher: list[int]
    places: list[tuple[int, int]]


def _pairs(text: str, student: Any, teacher: Any, block: int, most: int) -> list[_Pair]:
    """Stretches of at most `block` student tokens and `most` teacher tokens."""
    offsets = student(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for start in range(0, len(offsets), block):
        part = text[offsets[start][0] : offsets[min(start + block, len(offsets)) - 1][1]]
        own = student(part, add_special_tokens=False, return_offsets_mapping=True)
        other = teacher(part, add_special_tokens=False, return_offsets_mapping=True)
        ends = [e for _, e in own["offset_mapping"]][:block], [e for _, e in other["offset_mapping"]][:most]
        if len(ends[0]) > 1 and ends[1]:
            found.append(_Pair(own["input_ids"][:block], other["input_ids"][:most], common_boundaries(*ends)))
    return found


def cross_targets(
    teacher: Any, tokenizer: Any, data: Any, block: int, tokens: int, form: str, seed: int, other: Any = None
) -> tuple[Blocks, CrossTargets]:
    """(student blocks, padded on the right; the teacher's answers at them) on about `tokens` student tokens of the training text.

    tokenizer: the student's; other: the teacher's, by default its own. Raises UserError for an unknown form, and where the two
    tokenizers share no boundary or no token.
    """
    if form not in FORMS:
        raise UserError(f"--cross-tokenizer must be text, {' or '.join(FORMS)}; found {form!r}")
    other = other or teacher.tokenizer()
    most = getattr(teacher.config.get_text_config(), "max_position_embeddings", 4 * block)
    pairs: list[_Pair] = []
    count = 0
    for row in passages(data, "train", seed):
        for pair in _pairs(str(row.get("text") or ""), tokenizer, other, block, min(most, 4 * block)):
            pairs.append(pair)
            count += len(pair.student)
        if count >= tokens:
            break
    if not any(p.places for p in pairs):
        raise UserError(f"data {str(data)!r} has no text at which the two tokenizers meet; use --cross-tokenizer text")
    ids, mask = right_padded([p.student for p in pairs], block)
    theirs, their_mask = right_padded([p.teacher for p in pairs])
    place = torch.full(ids.shape, -1)
    for i, pair in enumerate(pairs):
        for own, at in pair.places:
            place[i, own] = at
    hidden = teacher.run(theirs, their_mask.long(), logits=False).hidden_states
    share = float((place >= 0).sum() / mask.sum())
    answers = CrossTargets(hidden, place, teacher.head, form, shared_tokens(tokenizer, other), share)
    return Blocks(ids, attention_mask=mask), answers
