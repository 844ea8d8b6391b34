"""Tokenise a text that is too large for memory: once, into files that are mapped, going on where it was stopped.

Files lie below the user's cache folder, named by a fingerprint of everything that they follow from: the bytes of the text, the
tokenizer, the template and the options. The tokenizer's own threads use all cores; chats are rendered by one.
"""

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import xxhash
from filelock import FileLock
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe2dense.common.progress import Report
from moe2dense.data.blocks import Blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.documents import Documents
from moe2dense.data.options import TextOptions
from moe2dense.data.records import Cursor, located_passages, source_files, source_revision
from moe2dense.data.remote import cache_folder
from moe2dense.data.token_files import TextState, TokenFiles
from moe2dense.data.token_text import Layout, TokenBuilder

LARGE = 2**24  # tokens of a text from which on it is mapped
_LARGE_BYTES = 2**26  # of files that are read whole
_BATCH = 1024  # passages that are tokenised at once
_SAVE_EVERY = 2**23  # tokens between two savings


def is_large(path: str | Path, split: str, tokens: int | None) -> bool:
    """Return whether a text is to be mapped: more than 16M tokens are wanted, or all of more than 64 MB."""
    if tokens is not None:
        return tokens > LARGE
    files = source_files(path, split)
    return not files or sum(f.stat().st_size for f in files) > _LARGE_BYTES


def mapped_blocks(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    split: str,
    tokens: int | None,
    seed: int,
    options: TextOptions,
    counts: TextCounts,
    progress: Report | None = None,
) -> Blocks | int:
    """Return the blocks of a source as `load_blocks` does, mapped from files that are written where they are not there.

    Return the number of tokens where they fill no block. Several processes may ask: one writes, the others wait for it. Raises
    UserError where the cache cannot be written, or the source not read.
    """
    fingerprint = text_fingerprint(path, tokenizer, layout, split, seed, options)
    files = TokenFiles(cache_folder() / "text" / fingerprint, fingerprint)
    limit = None if tokens is None else max(1, tokens // layout.block)
    wanted = None if limit is None else limit * layout.block
    files.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{files.folder}.lock"):
        state = files.begin()
        if not state.finished and (wanted is None or state.numbering.tokens < wanted):
            _tokenise(files, state, path, tokenizer, layout, split, wanted, seed, options, progress)
        text = files.text(state, wanted)
    counts.add(state.counts)
    return text.blocks(layout, limit)


def _tokenise(
    files: TokenFiles,
    state: TextState,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    split: str,
    wanted: int | None,
    seed: int,
    options: TextOptions,
    progress: Report | None,
) -> None:
    """Append documents until there are `wanted` tokens or the source ends, saving from time to time."""
    cursor = Cursor(state.position)
    rows = located_passages(path, split, seed, state.counts, cursor)
    documents = Documents(tokenizer, layout.block, options, state.counts)
    builder = TokenBuilder(int(tokenizer.eos_token_id), layout, state.numbering)  # type: ignore[arg-type]
    numbering, saved = state.numbering, state.numbering.tokens
    while wanted is None or numbering.tokens < wanted:
        batch = list(islice(rows, _BATCH))
        for document in documents.of(batch):
            builder.append(document)
        state.position, state.finished = cursor.position, not batch
        if numbering.tokens - saved >= _SAVE_EVERY:
            files.append(builder.take(), state)
            saved = numbering.tokens
            if progress:
                progress("text", numbering.tokens, wanted or numbering.tokens)
        if not batch:
            break
    files.append(builder.take(), state)


def text_fingerprint(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, layout: Layout, split: str, seed: int, options: TextOptions
) -> str:
    """Return 32 hex digits of everything that a text's tokens follow from, the bytes of its files included."""
    digest = xxhash.xxh3_128()
    for file in source_files(path, split):
        digest.update(f"\0{file.name}\0".encode())
        with open(file, "rb") as opened:
            while piece := opened.read(2**24):
                digest.update(piece)
    ways = [split, seed, layout.block, source_revision(path, split), asdict(options), options.template_text()]
    digest.update(json.dumps(ways, default=str).encode())
    digest.update(_tokenizer_text(tokenizer).encode())
    return digest.hexdigest()


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that differs where two tokenizers do."""
    special = [tokenizer.eos_token_id, list(tokenizer("a")["input_ids"]), tokenizer.chat_template]  # type: ignore[arg-type]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return json.dumps([special, tokenizer.backend_tokenizer.to_str()], default=str)
    return json.dumps([special, type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())], default=str)
