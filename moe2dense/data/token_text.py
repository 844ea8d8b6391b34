"""A text as one row of tokens, gathered document by document and cut into blocks: a few bytes a token, in memory or mapped."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks
from moe2dense.data.documents import Document

# T tokens, D documents, N blocks, S block length

# columns and their types in `array`; per token, and three numbers per document: domain, work, marks
TOKEN_COLUMNS = {"ids": "i", "owners": "i", "learnt": "B", "prefix": "B", "calls": "B", "real": "B"}
DOCUMENTS = "documents"
# marks of a document: answers are marked, its work is named, it begins with a BOS, it calls tools
_CHAT, _NAMED, _PREFIX, _CALLS = 1, 2, 4, 8


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


@dataclass
class Numbering:
    """What the documents so far are numbered by. works: the number of each work that has a name."""

    documents: int = 0
    tokens: int = 0
    next_work: int = 0
    domains: dict[str, int] = field(default_factory=dict)
    works: dict[str, int] = field(default_factory=dict)

    def work(self, name: str) -> int:
        """Return the number of a document's work; a document that names none is a work of its own."""
        number = self.works.get(name, self.next_work) if name else self.next_work
        if number == self.next_work:
            self.next_work += 1
            if name:
                self.works[name] = number
        return number


class TokenBuilder:
    """Appends documents, each closed by `eos`, to columns of numbers. layout: decides where padding stands before a chat."""

    def __init__(self, eos: int, layout: Layout, numbering: Numbering | None = None):
        self.layout = layout
        self.eos, self.numbering = eos, numbering or Numbering()
        self.columns = {name: array(kind) for name, kind in TOKEN_COLUMNS.items()} | {DOCUMENTS: array("i")}

    def append(self, document: Document) -> None:
        """Append one document."""
        columns, numbering = self.columns, self.numbering
        closing = [] if len(document.tokens) and document.tokens[-1] == self.eos else [self.eos]
        size = len(document.tokens) + len(closing)
        if document.learnt is not None:
            self._pad_before(size)
        columns["ids"].extend(document.tokens)
        columns["ids"].extend(closing)
        columns["owners"].extend(array("i", [numbering.documents]) * size)
        if document.learnt is None:
            columns["learnt"].frombytes(b"\1" * size)
        else:  # the closing token is learnt as the turn before it
            marks = bytes(document.learnt)
            columns["learnt"].frombytes(marks + marks[-1:] * (size - len(marks)))
        columns["real"].frombytes(b"\1" * size)
        columns["prefix"].frombytes(b"\1" * document.prefix + b"\0" * (size - document.prefix))
        called = bytes(document.calls) if document.calls else bytes(size)
        columns["calls"].frombytes(called + called[-1:] * (size - len(called)))
        kinds = (
            (document.learnt is not None, _CHAT),
            (document.work, _NAMED),
            (document.prefix, _PREFIX),
            (document.calls, _CALLS),
        )
        marks_of = sum(mark for given, mark in kinds if given)
        domain = numbering.domains.setdefault(document.domain, len(numbering.domains))
        columns[DOCUMENTS].extend([domain, numbering.work(document.work), marks_of])
        numbering.documents += 1
        numbering.tokens += size

    def _pad_before(self, size: int) -> None:
        """Fill up the block where chats are kept whole and one of `size` tokens does not fit into its rest, but into a block."""
        block, columns = self.layout.block, self.columns
        rest = -self.numbering.tokens % block
        if not (self.layout.whole_chats and 0 < rest < size <= block):
            return
        columns["ids"].extend(array("i", [self.eos]) * rest)
        columns["owners"].extend(array("i", [self.numbering.documents - 1]) * rest)
        for name in ("learnt", "calls", "real", "prefix"):
            columns[name].frombytes(bytes(rest))
        self.numbering.tokens += rest

    def take(self) -> dict[str, bytes]:
        """Return what was appended since the last time, by column, and forget it."""
        taken = {name: column.tobytes() for name, column in self.columns.items()}
        for column in self.columns.values():
            del column[:]
        return taken

    def text(self) -> "TokenText":
        """Return what was appended as a text in memory."""
        columns = {name: _tensor(column) for name, column in self.columns.items()}
        return TokenText(columns, list(self.numbering.domains))


def _tensor(column: array) -> Tensor:
    dtype = torch.uint8 if column.typecode == "B" else torch.int32
    return torch.frombuffer(column, dtype=dtype) if len(column) else torch.zeros(0, dtype=dtype)


@dataclass(frozen=True)
class TokenText:
    """columns: ids, owners (the number of its document), learnt, prefix, calls and real (0 or 1; 0 = padding) of each token [T]; documents [3 D].

    domains: their names, by number. folder: where the columns lie that are mapped into memory; None = they are in memory.
    works [T]: the number of each token's work, where that is mapped too.
    """

    columns: dict[str, Tensor]
    domains: list[str]
    folder: Path | None = None
    works: Tensor | None = None

    def __len__(self) -> int:
        return len(self.columns["ids"])

    def documents_of(self, tokens: int) -> Tensor:
        """Return [D, 3]: domain, work and marks of the documents that reach into the first `tokens` tokens."""
        last = min(tokens, len(self)) - 1
        count = int(self.columns["owners"][last]) + 1 if last >= 0 else 0
        return self.columns[DOCUMENTS].view(-1, 3)[:count]

    def blocks(self, layout: Layout, limit: int | None) -> Blocks | int:
        """Cut the text into at most `limit` blocks; the tokens that do not fill one are left out.

        Return the number of tokens when they fill no block.
        """
        block = layout.block
        count = len(self) // block if limit is None else min(limit, len(self) // block)
        if count == 0:
            return len(self)

        def rows(column: Tensor) -> Tensor:
            return column[: count * block].view(count, block)

        owners = rows(self.columns["owners"])
        documents = self.documents_of(len(self) if limit is None else limit * block)
        chat, named, prefixed, calling = (bool((documents[:, 2] & m).any()) for m in (_CHAT, _NAMED, _PREFIX, _CALLS))
        separate = layout.document_masks == "on" or (layout.document_masks == "auto" and chat)
        works = None
        if named:
            works = documents[:, 1].long()[owners.long()] if self.works is None else rows(self.works)
        calls = rows(self.columns["calls"]).view(torch.bool) if calling else None
        real = rows(self.columns["real"]).view(torch.bool) if layout.whole_chats else None
        mapped = self.folder is not None
        return Blocks(
            rows(self.columns["ids"]) if mapped else rows(self.columns["ids"]).long(),
            _domains(owners.numpy(), documents[:, 0].numpy(), self.domains),
            attention_mask=real if real is not None and not bool(real.all()) else None,
            document_ids=(owners if mapped else owners - owners[:, :1]) if separate else None,
            labels_mask=rows(self.columns["learnt"]).view(torch.bool) if chat else None,
            passages=owners if mapped else owners.long(),
            works=works,
            prefix_mask=rows(self.columns["prefix"]).view(torch.bool) if prefixed else None,
            calls_mask=calls if calls is not None and bool(calls.any()) else None,
            folder=self.folder,
        )

    def has_works(self, tokens: int) -> bool:
        """Return whether a document of the first `tokens` tokens names its work."""
        return bool((self.documents_of(tokens)[:, 2] & _NAMED).any())


def _domains(owners: np.ndarray, domain_of: np.ndarray, names: list[str]) -> list[str]:
    """Return the domain that most of each block's tokens have; owners [N, S], domain_of [D]."""
    if len(np.unique(domain_of)) == 1:
        return [names[int(domain_of[0])]] * len(owners)
    return [names[_commonest(row, domain_of)] for row in owners]


def _commonest(row: np.ndarray, domain_of: np.ndarray) -> int:
    """Return the domain with most of a block's tokens [S], the first of equal ones."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(row)) + 1])
    lengths = np.diff(np.append(starts, len(row)))
    totals: dict[int, int] = {}
    for domain, length in zip(domain_of[row[starts]].tolist(), lengths.tolist(), strict=True):
        totals[domain] = totals.get(domain, 0) + length
    return max(totals, key=lambda domain: totals[domain])


def numbering_state(numbering: Numbering) -> dict[str, Any]:
    """Return a numbering as JSON, without the names of works."""
    numbers = {name: getattr(numbering, name) for name in ("documents", "tokens", "next_work")}
    return numbers | {"domains": list(numbering.domains), "works": len(numbering.works)}
