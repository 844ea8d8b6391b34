"""Turn text into blocks of tokens: passages tokenised, joined with the end-of-text token and cut to one length."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from moe2dense.common.progress import Report
from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.documents import Documents
from moe2dense.data.options import DEFAULTS, TextOptions
from moe2dense.data.pack import packed
from moe2dense.data.records import HOW, located_passages, usable
from moe2dense.data.token_text import Layout
from moe2dense.data.tokenise import is_large, mapped_blocks
from moe2dense.errors import UserError


def load_blocks(
    path: str | Path | dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    split: str = "train",
    tokens: int | None = None,
    seed: int = 0,
    document_masks: str = "auto",
    spread: bool = False,
    options: TextOptions = DEFAULTS,
    counts: TextCounts | None = None,
    progress: Report | None = None,
) -> Blocks:
    """Read blocks of exactly `block` tokens of one split, about `tokens` of them (None = all there is), in a seeded order.

    path: a folder of {train,valid,test,ood} files (jsonl, ndjson, json, csv, tsv, txt, parquet, arrow; also .gz and .zst), one such
    file (split by a hash of each passage), a hub id (`owner/name` or `owner/name:configuration`), or a mixture {path: weight}, also
    written "PATH=0.7,PATH=0.3", whose parts contribute tokens in proportion. Records have `text`, or `messages` (chat: the
    assistant's tokens carry the loss), or `prompt` and `completion` (which carries the loss), and perhaps `domain`; docs/data.md has
    all forms. document_masks: on = tokens do not see the document before theirs; auto = on for chat only.
    spread: take few blocks of each of many passages, for text to judge on, and not all of the first passages.
    options: BOS, template and turns to learn. counts: takes in what was read and skipped; without it a warning says what was skipped.
    A text of more than 16M tokens is tokenised once, into files below the user's cache folder, and mapped (data/tokenise.py).
    Raises UserError when the source is missing, unreadable, without text, or holds less than one block.
    """
    if document_masks not in ("auto", "on", "off"):
        raise UserError(f"document_masks must be auto, on or off; found {document_masks!r}")
    if block < 2:
        raise UserError(f"block must be at least 2 tokens; found {block}")
    if isinstance(path, str) and "=" in path and not Path(path).exists():
        path = parse_mixture(path)
    seen = TextCounts()
    layout = Layout(block, document_masks, spread, options.fit == "whole")
    if isinstance(path, dict):
        blocks = _mixture(path, tokenizer, layout, split, tokens, seed, options, seen, progress)
    else:
        blocks = _read(path, tokenizer, layout, split, tokens, seed, options, seen, progress)
    if counts is not None:
        counts.add(seen)
    elif seen.skipped:
        warnings.warn(f"data {_source_name(str(path), split)}: {seen.sentence()}", stacklevel=2)
    return blocks


def _read(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    split: str,
    tokens: int | None,
    seed: int,
    options: TextOptions,
    counts: TextCounts,
    progress: Report | None,
) -> Blocks:
    """Return the blocks of one source."""
    if not layout.spread and is_large(path, split, tokens):
        _check_tokenizer(tokenizer)
        large = mapped_blocks(path, tokenizer, layout, split, tokens, seed, options, counts, progress)
        return _filled(large, layout, _source_name(path, split), counts)
    rows = located_passages(path, split, seed, counts)
    return _blocks(rows, tokenizer, layout, _source_name(path, split), tokens, options, counts)


def check_source(path: str, split: str) -> None:
    """Refuse text that cannot be read, by its first passage. Raises UserError as `load_blocks` does."""
    parts = parse_mixture(path) if "=" in path and not Path(path).exists() else {path: 1.0}
    for part in parts:
        counts = TextCounts()
        if next(located_passages(part, split, 0, counts), None) is None:
            seen = f": {counts.sentence()}" if counts.read else ""
            raise UserError(f"data {_source_name(part, split)} has no text{seen}; {HOW}")


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
    options: TextOptions = DEFAULTS,
) -> Blocks:
    """Turn records into blocks of exactly `block` tokens, in their order; see `load_blocks`. what: how errors call the data.

    A warning says which records are skipped.
    """
    counts = TextCounts()
    located = usable(((f"record {n}", row) for n, row in enumerate(rows, 1)), counts)
    blocks = _blocks(
        located, tokenizer, Layout(block, whole_chats=options.fit == "whole"), what, tokens, options, counts
    )
    if counts.skipped:
        warnings.warn(f"data {what}: {counts.sentence()}", stacklevel=2)
    return blocks


def _blocks(
    passages: Iterable[tuple[str, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    what: str,
    tokens: int | None,
    options: TextOptions,
    counts: TextCounts,
) -> Blocks:
    """Return the blocks of passages. Raises UserError where they fill none."""
    _check_tokenizer(tokenizer)
    limit = None if tokens is None else max(1, tokens // layout.block)
    documents = Documents(tokenizer, layout.block, options, counts).of(passages)
    blocks = packed(documents, layout, limit, cast(int, tokenizer.eos_token_id))
    return _filled(blocks, layout, what, counts)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a tokenizer that cannot separate passages."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token), which separates passages in a block")


def _filled(blocks: Blocks | int, layout: Layout, what: str, counts: TextCounts) -> Blocks:
    """Return blocks as they are. Raises UserError where a text's tokens fill none."""
    if isinstance(blocks, int):
        if not counts.used:
            seen = f": {counts.sentence()}" if counts.read else ""
            raise UserError(f"data {what} has no text{seen}; {_remedy(what, 0)}")
        size = f"{blocks} tokens, fewer than one block of {layout.block}"
        skipped = f" ({counts.sentence()})" if counts.skipped else ""
        raise UserError(f"data {what} has {size}{skipped}; {_remedy(what, blocks)}")
    return blocks


def _remedy(what: str, tokens: int) -> str:
    """Return what helps against a text that fills no block."""
    if "held out" in what:
        return "pass --valid with text of its own to hold out, more text, or a smaller --block"
    return "pass more or a smaller --block" if tokens else HOW


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
    layout: Layout,
    split: str,
    tokens: int | None,
    seed: int,
    options: TextOptions,
    counts: TextCounts,
    progress: Report | None,
) -> Blocks:
    """Return blocks of several sources, as many of each as its weight says, in one shuffled order."""
    total = sum(weights.values())
    if not weights or min(weights.values()) <= 0:
        raise UserError(f"the weights of a data mixture must be positive; found {weights}")
    if tokens is None:
        raise UserError("a data mixture needs a number of tokens: its parts are taken in proportion to their weights")
    parts = []
    for path, weight in weights.items():
        share, seen = round(tokens * weight / total), TextCounts()
        part = _read(path, tokenizer, layout, split, share, seed, options, seen, progress)
        counts.add(seen)
        if len(part) < share // layout.block:
            raise UserError(
                f"data {path!r} ({split}) has {part.tokens} tokens, fewer than its share of the mixture ({share}); "
                "lower its weight or --tokens"
            )
        parts.append(part)
    order = torch.randperm(sum(map(len, parts)), generator=torch.Generator().manual_seed(seed))
    return join_blocks(parts, order)
