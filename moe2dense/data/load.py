"""Turn text into blocks of tokens: passages tokenised, joined with the end-of-text token and cut to one length."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.chat import chat_tokens, completion_tokens
from moe2dense.data.records import HOW, passages
from moe2dense.data.spread import spread_over_passages
from moe2dense.errors import UserError

# N blocks, S tokens per block

_SPREAD_READ = 16  # times the text that is wanted, which is read at most to spread it over passages


def load_blocks(
    path: str | Path | dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    split: str = "train",
    tokens: int | None = None,
    seed: int = 0,
    document_masks: str = "auto",
    spread: bool = False,
) -> Blocks:
    """Read blocks of exactly `block` tokens of one split, about `tokens` of them (None = all there is), in a seeded order.

    path: a folder of {train,valid,test,ood}.{jsonl,jsonl.gz,json,txt,parquet,arrow}, one such file (split by a hash of
    each passage), a hub id (`owner/name` or `owner/name:configuration`), or a mixture {path: weight}, also written
    "PATH=0.7,PATH=0.3", whose parts contribute tokens in proportion. Records have `text`, or `messages` (chat: the assistant's tokens carry the loss),
    `prompt` and `completion` (which carries the loss), and perhaps `domain`. document_masks: on = tokens do not see the document before theirs; auto = on for chat only.
    spread: take few blocks of each of many passages, for text to judge on, and not all of the first passages.
    Raises UserError when the source is missing, unreadable, without text, or holds less than one block.
    """
    if document_masks not in ("auto", "on", "off"):
        raise UserError(f"document_masks must be auto, on or off; found {document_masks!r}")
    if block < 2:
        raise UserError(f"block must be at least 2 tokens; found {block}")
    if isinstance(path, str) and "=" in path and not Path(path).exists():
        path = parse_mixture(path)
    if isinstance(path, dict):
        return _mixture(path, tokenizer, block, split, tokens, seed, document_masks, spread)
    rows = passages(path, split, seed)
    return blocks_of(rows, tokenizer, block, _source_name(path, split), tokens, document_masks, spread)


def check_source(path: str, split: str) -> None:
    """Refuse text that cannot be read, by its first passage. Raises UserError as `load_blocks` does."""
    parts = parse_mixture(path) if "=" in path and not Path(path).exists() else {path: 1.0}
    for part in parts:
        if next(passages(part, split, 0), None) is None:
            raise UserError(f"data {_source_name(part, split)} has no text; {HOW}")


def _source_name(path: str | Path, split: str) -> str:
    """How errors call one split of a source: of a single file it is a share of the passages."""
    share = {"valid": "the 5% of its passages that are held out", "test": "5% of its passages"}.get(split)
    if share and Path(path).is_file():
        return f"{str(path)!r} ({split}: {share})"
    return f"{str(path)!r} ({split})"


def blocks_of(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    what: str,
    tokens: int | None = None,
    document_masks: str = "auto",
    spread: bool = False,
) -> Blocks:
    """Turn records into blocks of exactly `block` tokens, in their order; see `load_blocks`. what: how errors call the data."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token), which separates passages in a block")
    limit = None if tokens is None else max(1, tokens // block)
    documents, eos = _documents(iter(rows), tokenizer, what), cast(int, tokenizer.eos_token_id)
    if spread and limit is not None:
        blocks = _pack(_many(documents, limit, block), block, None, document_masks, eos)
        blocks = blocks if isinstance(blocks, int) else spread_over_passages(blocks, limit)
    else:
        blocks = _pack(documents, block, limit, document_masks, eos)
    if isinstance(blocks, int):
        size = f"{blocks} tokens, fewer than one block of {block}" if blocks else "no text"
        raise UserError(f"data {what} has {size}; {_remedy(what, blocks)}")
    return blocks


def _remedy(what: str, tokens: int) -> str:
    """Return what helps against a text that fills no block."""
    if "held out" in what:
        return "pass --valid with text of its own to hold out, more text, or a smaller --block"
    return "pass more or a smaller --block" if tokens else HOW


@dataclass
class _Document:
    tokens: list[int]
    learnt: list[bool] | None  # None: all (plain text)
    domain: str
    work: str = ""  # the record's `source`: "" where it names none


def _many(documents: Iterable[_Document], limit: int, block: int) -> Iterator[_Document]:
    """Yield documents until there is one for each of `limit` blocks and text for all of these, or 16 times that text."""
    tokens = 0
    for count, document in enumerate(documents, 1):
        yield document
        tokens += len(document.tokens) + 1
        if tokens >= limit * block and (count >= limit or tokens >= _SPREAD_READ * limit * block):
            return


def _documents(rows: Iterator[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, what: str) -> Iterator[_Document]:
    """Yield passages as tokens, tokenised in batches. Empty ones are skipped."""
    count = 0
    while batch := list(islice(rows, 64)):
        plain = []
        for row in batch:
            count += 1
            if row.get("messages"):
                ids, learnt = chat_tokens(row["messages"], tokenizer)
                yield _Document(ids, learnt, str(row.get("domain") or ""), str(row.get("source") or ""))
            elif isinstance(row.get("completion"), str):
                ids, learnt = completion_tokens(str(row.get("prompt") or ""), row["completion"], tokenizer)
                yield _Document(ids, learnt, str(row.get("domain") or ""), str(row.get("source") or ""))
            elif isinstance(row.get("text"), str):
                plain.append(row)
            elif row.get("text") is not None:
                kind = type(row["text"]).__name__
                raise UserError(f"data {what}: `text` must be a string; record {count} has {kind}")
        plain = [row for row in plain if row["text"].strip()]
        if plain:
            ids = tokenizer([row["text"] for row in plain], add_special_tokens=False)["input_ids"]
            for row, tokens in zip(plain, ids, strict=True):
                yield _Document(tokens, None, str(row.get("domain") or ""), str(row.get("source") or ""))


def _pack(documents: Iterable[_Document], block: int, limit: int | None, masks: str, eos: int) -> Blocks | int:
    """Cut documents, each closed by `eos`, into blocks; the tokens that do not fill one are left out.

    Return the number of tokens when they fill no block.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    owner: list[int] = []
    domains: list[str] = []
    works: list[str] = []
    chat = False
    for number, document in enumerate(documents):
        closed = document.tokens if document.tokens[-1:] == [eos] else [*document.tokens, eos]
        chat = chat or document.learnt is not None
        marks = [True] * len(closed) if document.learnt is None else document.learnt
        ids += closed
        learnt += marks + marks[-1:] * (len(closed) - len(marks))  # the closing token is learnt as the turn before it
        owner += [number] * len(closed)
        domains.append(document.domain)
        works.append(document.work)
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
        passages=owners,
        works=_work_numbers(works)[owners] if any(works) else None,
    )


def _work_numbers(works: list[str]) -> Tensor:
    """Return the number of each passage's work; a passage that names none is a work of its own."""
    numbers: dict[str | int, int] = {}
    return torch.tensor([numbers.setdefault(work or i, len(numbers)) for i, work in enumerate(works)])


def parse_mixture(text: str) -> dict[str, float]:
    """Return {path: weight} for `a.jsonl=0.7,owner/name=0.3`. Raises UserError when a part has no weight or is named twice."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        path, _, weight = part.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not path or value <= 0 or path in weights:
            raise UserError(
                f"data mixture {text!r} must be PATH=WEIGHT,PATH=WEIGHT with positive weights; found {part!r}"
            )
        weights[path] = value
    return weights


def _mixture(
    weights: dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    split: str,
    tokens: int | None,
    seed: int,
    masks: str,
    spread: bool = False,
) -> Blocks:
    """Return blocks of several sources, as many of each as its weight says, in one shuffled order."""
    total = sum(weights.values())
    if not weights or min(weights.values()) <= 0:
        raise UserError(f"the weights of a data mixture must be positive; found {weights}")
    if tokens is None:
        raise UserError("a data mixture needs a number of tokens: its parts are taken in proportion to their weights")
    parts = []
    for path, weight in weights.items():
        share = round(tokens * weight / total)
        part = load_blocks(path, tokenizer, block, split, share, seed, masks, spread)
        if len(part) < share // block:
            raise UserError(
                f"data {path!r} ({split}) has {part.tokens} tokens, fewer than its share of the mixture ({share}); "
                "lower its weight or --tokens"
            )
        parts.append(part)
    blocks = join_blocks(parts)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
