"""Text as blocks of tokens: passages tokenised, joined with the end-of-text token and cut to one length."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from moe2dense.chat import chat_tokens, completion_tokens
from moe2dense.errors import UserError
from moe2dense.sources import HOW, passages

# N blocks, S tokens per block


@dataclass
class Blocks:
    """N blocks of S tokens, on the CPU.

    input_ids [N, S] int64; domains: N labels, "" when unknown, the one most of a block's tokens have;
    attention_mask [N, S] bool, None = every token is real; document_ids [N, S] int, None = a block is one document;
    labels_mask [N, S] bool, the tokens that are to be learnt (the assistant's, in a chat), None = every real one.
    """

    input_ids: Tensor
    domains: list[str] = field(default_factory=list)
    attention_mask: Tensor | None = None
    document_ids: Tensor | None = None
    labels_mask: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.dim() == 2 and self.input_ids.dtype == torch.int64, "input_ids must be [N, S] int64"
        self.domains = list(self.domains) or [""] * len(self.input_ids)
        assert len(self.domains) == len(self.input_ids), "one domain per block"

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice | list[int] | Tensor) -> "Blocks":
        rows = torch.arange(len(self))[index]
        optional = (self.attention_mask, self.document_ids, self.labels_mask)
        return Blocks(
            self.input_ids[rows],
            [self.domains[i] for i in rows.tolist()],
            *(None if x is None else x[rows] for x in optional),
        )

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def labels(self) -> Tensor:
        """[N, S] int64: the token that follows each position, -100 where there is none or it is not to be learnt."""
        labels = torch.full_like(self.input_ids, -100)
        labels[:, :-1] = self.input_ids[:, 1:]
        if self.document_ids is not None:
            labels[:, :-1][self.document_ids[:, 1:] != self.document_ids[:, :-1]] = -100
        for mask in (self.attention_mask, self.labels_mask):
            if mask is not None:
                labels[:, :-1][~mask[:, 1:].bool()] = -100
        return labels

    def loss_mask(self) -> Tensor:
        """[N, S] bool: the positions whose next-token distribution is distilled.

        Every real token's, also a block's last, which has no label; in a chat those that predict the assistant's words.
        """
        if self.labels_mask is not None:
            return self.labels() != -100
        return torch.ones_like(self.input_ids, dtype=torch.bool) if self.attention_mask is None else self.attention_mask

    def keys(self) -> list[str]:
        """A content hash per block: of its tokens and, where given, its masks."""
        parts = [x.numpy() for x in (self.input_ids, self.attention_mask, self.document_ids) if x is not None]
        return [xxhash.xxh3_128_hexdigest(b"".join(p[i].tobytes() for p in parts)) for i in range(len(self))]


def load_blocks(
    path: str | Path | dict[str, float],
    tokenizer: Any,
    block: int,
    split: str = "train",
    tokens: int | None = None,
    seed: int = 0,
    document_masks: str = "auto",
) -> Blocks:
    """Blocks of exactly `block` tokens of one split, about `tokens` of them (None = all there is), in a seeded order.

    path: a folder of {train,valid,test,ood}.{jsonl,jsonl.gz,json,txt,parquet,arrow}, one such file (split by a hash of
    each passage), a hub id (`owner/name` or `owner/name:configuration`), or a mixture {path: weight}, also written
    "PATH=0.7,PATH=0.3", whose parts contribute tokens in proportion. Records have `text`, or `messages` (chat: the assistant's tokens carry the loss),
    `prompt` and `completion` (which carries the loss), and perhaps `domain`. document_masks: on = tokens do not see the document before theirs; auto = on for chat only.
    Raises UserError when the source is missing, unreadable, without text, or holds less than one block.
    """
    if document_masks not in ("auto", "on", "off"):
        raise UserError(f"document_masks must be auto, on or off; found {document_masks!r}")
    if block < 2:
        raise UserError(f"block must be at least 2 tokens; found {block}")
    if isinstance(path, str) and "=" in path and not Path(path).exists():
        path = parse_mixture(path)
    if isinstance(path, dict):
        return _mixture(path, tokenizer, block, split, tokens, seed, document_masks)
    return blocks_of(passages(path, split, seed), tokenizer, block, f"{str(path)!r} ({split})", tokens, document_masks)


def blocks_of(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    block: int,
    what: str,
    tokens: int | None = None,
    document_masks: str = "auto",
) -> Blocks:
    """Records as blocks of exactly `block` tokens, in their order; see `load_blocks`. what: how errors call the data."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token), which separates passages in a block")
    limit = None if tokens is None else max(1, tokens // block)
    documents = _documents(iter(rows), tokenizer, what)
    blocks = _pack(documents, block, limit, document_masks, tokenizer.eos_token_id)
    if isinstance(blocks, int):
        found = f"{blocks} tokens, fewer than one block of {block}" if blocks else "no text"
        raise UserError(f"data {what} has {found}; {HOW if not blocks else 'pass more or a smaller --block'}")
    return blocks


@dataclass
class _Document:
    tokens: list[int]
    learnt: list[bool] | None  # None: all (plain text)
    domain: str


def _documents(rows: Iterator[dict[str, Any]], tokenizer: Any, what: str) -> Iterator[_Document]:
    """Passages as tokens, tokenised in batches. Empty ones are skipped."""
    count = 0
    while batch := list(islice(rows, 64)):
        plain = []
        for row in batch:
            count += 1
            if row.get("messages"):
                ids, learnt = chat_tokens(row["messages"], tokenizer)
                yield _Document(ids, learnt, str(row.get("domain") or ""))
            elif isinstance(row.get("completion"), str):
                ids, learnt = completion_tokens(str(row.get("prompt") or ""), row["completion"], tokenizer)
                yield _Document(ids, learnt, str(row.get("domain") or ""))
            elif isinstance(row.get("text"), str):
                plain.append(row)
            elif row.get("text") is not None:
                kind = type(row["text"]).__name__
                raise UserError(f"data {what}: `text` must be a string; record {count} has {kind}")
        plain = [row for row in plain if row["text"].strip()]
        if plain:
            ids = tokenizer([row["text"] for row in plain], add_special_tokens=False)["input_ids"]
            for row, found in zip(plain, ids, strict=True):
                yield _Document(found, None, str(row.get("domain") or ""))


def _pack(documents: Iterable[_Document], block: int, limit: int | None, masks: str, eos: int) -> Blocks | int:
    """Documents, each closed by `eos`, cut into blocks; the tokens that do not fill one are left out.

    Returns the number of tokens found when they fill no block.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    owner: list[int] = []
    domains: list[str] = []
    chat = False
    for number, document in enumerate(documents):
        closed = document.tokens if document.tokens[-1:] == [eos] else [*document.tokens, eos]
        chat = chat or document.learnt is not None
        marks = [True] * len(closed) if document.learnt is None else document.learnt
        ids += closed
        learnt += marks + marks[-1:] * (len(closed) - len(marks))  # the closing token is learnt as the turn before it
        owner += [number] * len(closed)
        domains.append(document.domain)
        if limit is not None and len(ids) >= limit * block:
            break
    count = len(ids) // block if limit is None else min(limit, len(ids) // block)
    if count == 0:
        return len(ids)

    def cut(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values[: count * block], dtype=dtype).view(count, block)

    owners = cut(owner, torch.int64)
    separate = masks == "on" or (masks == "auto" and chat)
    labels = [Counter(domains[i] for i in row).most_common(1)[0][0] for row in owners.tolist()]
    return Blocks(
        cut(ids, torch.int64),
        labels,
        document_ids=(owners - owners[:, :1]).to(torch.int32) if separate else None,
        labels_mask=cut(learnt, torch.bool) if chat else None,
    )


def right_padded(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids [N, W] int64, mask [N, W] bool) of rows of token ids, filled up with 0 to the longest or to `width`."""
    width = max(map(len, rows), default=0) if width is None else width
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def join_blocks(parts: list[Blocks]) -> Blocks:
    """Several sets of blocks of one length as one; a mask that only some have is filled in for the others."""
    ids = torch.cat([p.input_ids for p in parts])

    def together(name: str, default: int | bool, dtype: torch.dtype) -> Tensor | None:
        found = [getattr(p, name) for p in parts]
        if all(x is None for x in found):
            return None
        rows = zip(found, parts, strict=True)
        return torch.cat([torch.full(p.input_ids.shape, default, dtype=dtype) if x is None else x for x, p in rows])

    return Blocks(
        ids,
        [d for p in parts for d in p.domains],
        together("attention_mask", True, torch.bool),
        together("document_ids", 0, torch.int32),
        together("labels_mask", True, torch.bool),
    )


def parse_mixture(text: str) -> dict[str, float]:
    """`a.jsonl=0.7,owner/name=0.3` -> {path: weight}. Raises UserError when a part has no weight or is named twice."""
    found: dict[str, float] = {}
    for part in text.split(","):
        path, _, weight = part.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not path or value <= 0 or path in found:
            raise UserError(
                f"data mixture {text!r} must be PATH=WEIGHT,PATH=WEIGHT with positive weights; found {part!r}"
            )
        found[path] = value
    return found


def _mixture(
    weights: dict[str, float], tokenizer: Any, block: int, split: str, tokens: int | None, seed: int, masks: str
):
    """Blocks of several sources, as many of each as its weight says, in one shuffled order."""
    total = sum(weights.values())
    if not weights or min(weights.values()) <= 0:
        raise UserError(f"the weights of a data mixture must be positive; found {weights}")
    if tokens is None:
        raise UserError("a data mixture needs a number of tokens: its parts are taken in proportion to their weights")
    parts = []
    for path, weight in weights.items():
        share = round(tokens * weight / total)
        part = load_blocks(path, tokenizer, block, split, share, seed, masks)
        if len(part) < share // block:
            raise UserError(
                f"data {path!r} ({split}) has {part.tokens} tokens, fewer than its share of the mixture ({share}); "
                "lower its weight or --tokens"
            )
        parts.append(part)
    blocks = join_blocks(parts)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
