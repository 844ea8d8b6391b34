"""A captured set as text and as targets: its rows become blocks, and what was captured of them becomes what a loss reads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks, right_padded
from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.distillation.targets.captured.rows import CapturedRow, CapturedRows, open_rows
from moe2dense.errors import UserError
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.losses.teacher_rows import TopKRows

# N blocks, S block length, k tokens of a position

_SAMPLE = 8  # rows that are looked at to tell whether a set is what it seems
_ROUND_TRIP = 0.9  # share of a text's tokens that the right tokenizer finds again, at least
_COVERED = 0.3  # share of next tokens among a real teacher's k likeliest, at least; k is 50 or more in published sets
_NORMALISED = 0.05  # nats by which log-probabilities of the likeliest tokens may sum to more than 1


@dataclass(frozen=True)
class CapturedText:
    """The blocks of a captured set, and what of it they leave out: tokens beyond the blocks' length, rows without any token."""

    blocks: Blocks
    dropped_tokens: int = 0
    dropped_rows: int = 0

    def sentence(self) -> str:
        """Return in words what was read."""
        lost = f"; {self.dropped_tokens} tokens beyond the block's length are left out" if self.dropped_tokens else ""
        empty = f"; {self.dropped_rows} rows hold no token" if self.dropped_rows else ""
        return f"{len(self.blocks)} rows with {self.blocks.tokens} tokens{lost}{empty}"


@dataclass
class CapturedTargets:
    """What was captured at every position of some rows. numbers: the row in the set of each block; length: S.

    tail: the values are log-probabilities, and what they leave over is one bucket; else they are logits, known up to a constant, and
    stand for the whole distribution.
    """

    rows: CapturedRows
    numbers: list[int]
    length: int
    tail: bool = True

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Sequence[int]) -> TopKRows:
        """Return the teacher at every position of some blocks, in their order. Padding has its mass outside the k tokens."""
        ids, values = zip(*(self._block(self.numbers[i]) for i in indices), strict=True)
        return TopKRows(torch.cat(ids), torch.cat(values), tail=self.tail)

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        count = min(self.length, len(self.rows.row(number).ids))
        ids, values = self.rows.likeliest(number, count)
        left = self.length - count
        if left:
            k = ids.shape[1]
            ids = torch.cat([ids, torch.arange(k).expand(left, k)])
            values = torch.cat([values, torch.full((left, k), -6e4)])
        return ids, values.clamp(max=0.0) if self.tail else values.log_softmax(-1)


def captured_text(
    folder: str | Path, longest: int, tokens: int | None = None, settings: str | Path = ""
) -> CapturedText:
    """Read the text of a captured set as blocks, one a row; longer rows are cut at `longest`, shorter ones are padded.

    tokens: about how many; None for all. Raises UserError for what is no captured set.
    """
    rows = open_rows(folder, settings, tokens)
    read: list[CapturedRow] = []
    dropped = empty = taken = 0
    for number in range(len(rows)):
        row = rows.row(number)
        count = len(row.ids)
        if not count:
            empty += 1
            continue
        read.append(CapturedRow(row.ids[:longest], None if row.mask is None else row.mask[:longest]))
        dropped += max(0, count - longest)
        taken += min(count, longest)
        if tokens is not None and taken >= tokens:
            break
    if not read:
        raise UserError(f"{folder} holds no row with a token")
    return CapturedText(_blocks(read), dropped, empty)


def _blocks(rows: list[CapturedRow]) -> Blocks:
    """Return rows as blocks with their documents. A mask counts documents from 1, and 0 is padding."""
    ids, real = right_padded([row.ids.tolist() for row in rows])
    documents = torch.zeros_like(ids, dtype=torch.int32)
    for i, row in enumerate(rows):
        if row.mask is not None:
            documents[i, : len(row.mask)] = row.mask.int()
            real[i, : len(row.mask)] &= row.mask > 0
    several = bool((documents.amax(1) > 1).any())
    return Blocks(ids, attention_mask=None if bool(real.all()) else real, document_ids=documents if several else None)


def open_captured(
    folder: str | Path, blocks: Blocks, tokenizer: PreTrainedTokenizerBase | None = None, settings: str | Path = ""
) -> CapturedTargets:
    """Open what was captured of `blocks`, which `captured_text` read of the same set, in any order.

    Raises UserError for other text, for another vocabulary than the tokenizer's, and for a set that is packed otherwise than it says.
    """
    length = blocks.input_ids.shape[1]
    rows = open_rows(folder, settings)
    places: dict[bytes, int] = {}
    wanted = {ids.numpy().tobytes() for ids in blocks.input_ids}
    for number in range(len(rows)):
        ids, _ = right_padded([rows.row(number).ids[:length].tolist()], length)
        places.setdefault(ids[0].numpy().tobytes(), number)
        if wanted <= places.keys():
            break
    numbers = [places.get(ids.numpy().tobytes(), -1) for ids in blocks.input_ids]
    if missing := sum(number < 0 for number in numbers):
        raise UserError(
            f"{folder} lacks {missing} of the {len(numbers)} blocks: a captured set is its own text, so leave out --data"
        )
    targets = CapturedTargets(rows, numbers, length)
    _check(targets, blocks, tokenizer)
    return targets


def _check(targets: CapturedTargets, blocks: Blocks, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Look at some rows: their tokens, and whether what was captured fits them. Settles whether the values are log-probabilities."""
    folder, packing = targets.rows.folder, targets.rows.packing
    sample = range(min(_SAMPLE, len(targets)))
    largest = int(blocks.input_ids.max())
    if largest >= packing.d:
        raise UserError(
            f"{folder} has token {largest}, and its settings say that there are {packing.d}; they are of another set"
        )
    if tokenizer is not None:
        _check_vocabulary(folder, blocks, sample, tokenizer, packing.d)
    read = [targets.rows.likeliest(targets.numbers[i], _real(targets, i)) for i in sample]
    covered = torch.cat(
        [(ids[:-1] == blocks.input_ids[i, 1 : len(ids), None]).any(1) for i, (ids, _) in zip(sample, read, strict=True)]
    )
    if packing.k >= 16 and len(covered) and float(covered.float().mean()) < _COVERED:
        raise UserError(
            f"{folder}: the text's next token is among the {packing.k} likeliest at {float(covered.float().mean()):.0%} of the positions, "
            f"which no teacher is so bad at; its settings are those of another set"
        )
    total = torch.cat([values.logsumexp(1) for _, values in read])
    targets.tail = bool(total.max() <= _NORMALISED)


def _real(targets: CapturedTargets, index: int) -> int:
    """Return how many positions of a block are no padding behind the row."""
    return min(targets.length, len(targets.rows.row(targets.numbers[index]).ids))


def _check_vocabulary(
    folder: Path, blocks: Blocks, sample: range, tokenizer: PreTrainedTokenizerBase, size: int
) -> None:
    """Raise UserError where the set's ids are not the tokenizer's.

    A tokenizer that lies in the folder is compared token by token. Without one the text is decoded and cut into tokens again: only the
    tokenizer that made it finds nearly all of them.
    """
    place = folder if folder.is_dir() else folder.parent
    if (place / "tokenizer.json").is_file() or (place / "tokenizer").is_dir():
        own = load_tokenizer(place / "tokenizer" if (place / "tokenizer").is_dir() else place)
        compared = compare_vocabularies(own, tokenizer)
        if not compared.same:
            raise UserError(
                f"{folder} is of a teacher with another tokenizer ({compared.difference}); take a student that has it"
            )
        return
    known, special = set(tokenizer.get_vocab().values()), set(tokenizer.all_special_ids)
    found = total = 0
    for i in sample:
        real = slice(None) if blocks.attention_mask is None else blocks.attention_mask[i]
        ids = [t for t in blocks.input_ids[i][real].tolist() if t not in special]
        again = tokenizer(str(tokenizer.decode([t for t in ids if t in known])), add_special_tokens=False)["input_ids"]
        found += sum((Counter(ids) & Counter(again)).values())
        total += len(ids)
    if found < _ROUND_TRIP * total:
        raise UserError(
            f"{folder} has another vocabulary than the student ({size} tokens in its settings): decoded and cut again by the student's "
            f"tokenizer, {found / total:.0%} of its tokens come back; take a student with its teacher's tokenizer"
        )
