"""Pack documents into blocks of one length, each document closed by the end-of-text token."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.data.documents import Document
from moe2dense.data.spread import spread_over_passages

_SPREAD_READ = 16  # times the text that is wanted, which is read at most to spread it over passages


@dataclass(frozen=True)
class Layout:
    """How documents lie in blocks.

    block: tokens of a block; document_masks: whether a token is kept from seeing the document before its own, auto = in chats;
    spread: whether few blocks of each of many passages are taken, and not all of the first passages. whole_chats: a chat that does not
    fit into the rest of a block begins in the next one, and the rest is padding; one that is longer than a block is cut all the same.
    """

    block: int
    document_masks: str = "auto"
    spread: bool = False
    whole_chats: bool = False


def packed(documents: Iterable[Document], layout: Layout, limit: int | None, eos: int) -> Blocks | int:
    """Return at most `limit` blocks of documents, or the number of tokens where they fill none."""
    if not layout.spread or limit is None:
        return _pack(documents, layout, limit, eos)
    blocks = _pack(_many(documents, limit, layout.block), layout, None, eos)
    return blocks if isinstance(blocks, int) else spread_over_passages(blocks, limit)


def _many(documents: Iterable[Document], limit: int, block: int) -> Iterator[Document]:
    """Yield documents until there is one for each of `limit` blocks and text for all of these, or 16 times that text."""
    tokens = 0
    for count, document in enumerate(documents, 1):
        yield document
        tokens += len(document.tokens) + 1
        if tokens >= limit * block and (count >= limit or tokens >= _SPREAD_READ * limit * block):
            return


def _pack(documents: Iterable[Document], layout: Layout, limit: int | None, eos: int) -> Blocks | int:
    """Cut documents, each closed by `eos`, into blocks; the tokens that do not fill the last one are left out.

    Return the number of tokens when they fill no block.
    """
    block = layout.block
    ids: list[int] = []
    learnt: list[bool] = []
    calls: list[bool] = []
    real: list[bool] = []
    prefix: list[bool] = []
    owner: list[int] = []
    domains: list[str] = []
    works: list[str] = []
    chat = False
    for number, document in enumerate(documents):
        closed = document.tokens if document.tokens[-1:] == [eos] else [*document.tokens, eos]
        chat = chat or document.learnt is not None
        rest = -len(ids) % block
        if (
            layout.whole_chats
            and document.learnt is not None
            and rest < len(closed)
            and rest > 0
            and len(closed) <= block
        ):
            ids += [eos] * rest
            owner += owner[-1:] * rest
            for marks_of in (learnt, calls, real, prefix):
                marks_of += [False] * rest
        marks = [True] * len(closed) if document.learnt is None else document.learnt
        ids += closed
        learnt += marks + marks[-1:] * (len(closed) - len(marks))  # the closing token is learnt as the turn before it
        real += [True] * len(closed)
        called = document.calls or [False] * len(document.tokens)
        calls += called + called[-1:] * (len(closed) - len(called))
        prefix += [i < document.prefix for i in range(len(closed))]
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
    separate = layout.document_masks == "on" or (layout.document_masks == "auto" and chat)
    labels = [Counter(domains[i] for i in row).most_common(1)[0][0] for row in owners.tolist()]
    return Blocks(
        cut(ids, torch.int64),
        labels,
        attention_mask=None if all(real[: count * block]) else cut(real, torch.bool),
        document_ids=(owners - owners[:, :1]).to(torch.int32) if separate else None,
        labels_mask=cut(learnt, torch.bool) if chat else None,
        passages=owners,
        works=_work_numbers(works)[owners] if any(works) else None,
        prefix_mask=cut(prefix, torch.bool) if any(prefix) else None,
        calls_mask=cut(calls, torch.bool) if any(calls[: count * block]) else None,
    )


def _work_numbers(works: list[str]) -> Tensor:
    """Return the number of each passage's work; a passage that names none is a work of its own."""
    numbers: dict[str | int, int] = {}
    return torch.tensor([numbers.setdefault(work or i, len(numbers)) for i, work in enumerate(works)])
