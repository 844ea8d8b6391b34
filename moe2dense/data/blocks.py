"""Hold blocks of tokens with their masks, documents and domains; derive labels and the positions that count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from moe2dense.data.mapped import empty_map

# tokens of mapped blocks that are read into memory when they are taken; a larger part stays mapped
_IN_MEMORY = 2**22
_CHUNK = 2**20  # tokens that are worked on at once


@dataclass
class Blocks:
    """N blocks of S tokens, on the CPU.

    input_ids [N, S] int64; domains: N labels, "" when unknown, the one most of a block's tokens have;
    attention_mask [N, S] bool, None = every token is real; document_ids [N, S] int, None = a block is one document;
    labels_mask [N, S] bool, the tokens that are to be learnt (the assistant's, in a chat), None = every real one;
    passages, works [N, S] int64: numbers of the passage and of the work (a record's `source`) that each token comes from,
    None = unknown. A passage without a source is a work of its own.
    prefix_mask [N, S] bool, the tokens that a tokenizer puts before a document (BOS), which nothing predicts; None = there are none.
    calls_mask [N, S] bool, the tokens of tool calls, which may weigh more than others; None = there are none.
    folder: where a text lies that is too large for memory. Its tensors are files, mapped, with numbers in int32; what is taken
    from it, up to 4M tokens at once, is in memory as above.
    """

    input_ids: Tensor
    domains: list[str] = field(default_factory=list)
    attention_mask: Tensor | None = None
    document_ids: Tensor | None = None
    labels_mask: Tensor | None = None
    passages: Tensor | None = None
    works: Tensor | None = None
    prefix_mask: Tensor | None = None
    calls_mask: Tensor | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        expected = torch.int64 if self.folder is None else torch.int32
        assert self.input_ids.dim() == 2 and self.input_ids.dtype == expected, f"input_ids must be [N, S] {expected}"
        self.domains = list(self.domains) or [""] * len(self.input_ids)
        assert len(self.domains) == len(self.input_ids), "one domain per block"

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice | list[int] | Tensor) -> "Blocks":
        rows = torch.arange(len(self))[index]
        if self.folder is not None and rows.numel() * self.input_ids.shape[1] > _IN_MEMORY:
            whole = isinstance(index, slice) and index.step in (None, 1)
            return self._view(index) if whole else _gathered([self], rows)  # type: ignore[arg-type]
        columns: dict[str, Tensor | None] = {name: getattr(self, name) for name in _COLUMNS[1:]}
        parts = {name: None if x is None else x[rows] for name, x in columns.items()}
        domains = [self.domains[i] for i in rows.tolist()]
        taken = Blocks(self.input_ids[rows].long(), domains, **parts)  # type: ignore[arg-type]
        return taken if self.folder is None else _as_in_memory(taken)

    def _view(self, rows: slice) -> "Blocks":
        """Return consecutive blocks of a mapped text, mapped."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        parts = {name: None if column is None else column[rows] for name, column in columns.items()}
        return Blocks(domains=self.domains[rows], folder=self.folder, **parts)  # type: ignore[arg-type]

    def in_parts(self, tokens: int = _CHUNK) -> Iterator["Blocks"]:
        """Yield all blocks in their order, some at a time, each part in memory."""
        size = max(1, min(tokens, _IN_MEMORY) // self.input_ids.shape[1])
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def tokens(self) -> int:
        """Return how many real tokens there are."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def labels(self) -> Tensor:
        """Return [N, S] int64: the token that follows each position, -100 where there is none or it is not to be learnt."""
        labels = torch.full(self.input_ids.shape, -100, dtype=torch.int64)
        labels[:, :-1] = self.input_ids[:, 1:]
        if self.document_ids is not None:
            labels[:, :-1][self.document_ids[:, 1:] != self.document_ids[:, :-1]] = -100
        for mask in (self.attention_mask, self.labels_mask):
            if mask is not None:
                labels[:, :-1][~mask[:, 1:].bool()] = -100
        if self.prefix_mask is not None:
            labels[:, :-1][self.prefix_mask[:, 1:]] = -100
        return labels

    def loss_mask(self) -> Tensor:
        """Return [N, S] bool: the positions whose next-token distribution is distilled.

        Every real token's that precedes no BOS, also a block's last, which has no label; in a chat those that predict the
        assistant's words.
        """
        if self.labels_mask is not None:
            return self.labels() != -100
        mask = torch.ones_like(self.input_ids, dtype=torch.bool) if self.attention_mask is None else self.attention_mask
        if self.prefix_mask is not None:
            mask = mask.bool().clone()
            mask[:, :-1] &= ~self.prefix_mask[:, 1:]
        return mask

    def call_positions(self) -> Tensor | None:
        """Return [N, S] bool: the positions whose next token belongs to a tool call; None where there are none."""
        if self.calls_mask is None:
            return None
        positions = torch.zeros_like(self.calls_mask)
        positions[:, :-1] = self.calls_mask[:, 1:]
        return positions

    def keys(self) -> list[str]:
        """Return a content hash per block: of its tokens and, where given, its masks."""
        return [key for part in self.in_parts() for key in _keys(part)]


_COLUMNS = (
    "input_ids",
    "attention_mask",
    "document_ids",
    "labels_mask",
    "passages",
    "works",
    "prefix_mask",
    "calls_mask",
)
_NUMBERED = ("passages", "works")


def _keys(blocks: Blocks) -> list[str]:
    """Return the content hashes of blocks in memory."""
    parts = [x.numpy() for x in (blocks.input_ids, blocks.attention_mask, blocks.document_ids) if x is not None]
    return [xxhash.xxh3_128_hexdigest(b"".join(p[i].tobytes() for p in parts)) for i in range(len(blocks))]


def _as_in_memory(taken: Blocks) -> Blocks:
    """Return blocks taken from a mapped text with the types and numbers that blocks in memory have."""
    documents = taken.document_ids
    if documents is not None:
        documents = documents - documents[:, :1]
    numbers = {n: None if (x := getattr(taken, n)) is None else x.long() for n in _NUMBERED}
    return replace(taken, document_ids=documents, **numbers)


def right_padded(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (ids [N, W] int64, mask [N, W] bool) of rows of token ids, filled up with 0 to the longest or to `width`."""
    width = max(map(len, rows), default=0) if width is None else width
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def join_blocks(parts: list[Blocks], order: Tensor | None = None) -> Blocks:
    """Join several sets of blocks of one length; a mask that only some have is filled in for the others.

    order [M]: which of the joined blocks are taken, and in what order; all of them by default. Where one of the sets is mapped,
    so is the result, in a file of its own that goes with it.
    """
    if any(p.folder is not None for p in parts):
        return _gathered(parts, torch.arange(sum(map(len, parts))) if order is None else order)
    joined = _joined(parts)
    return joined if order is None else joined[order]


def _joined(parts: list[Blocks]) -> Blocks:
    """Return the blocks of several sets in memory, one under the other."""
    ids = torch.cat([p.input_ids for p in parts])

    def together(name: str, default: int | bool, dtype: torch.dtype) -> Tensor | None:
        masks = [getattr(p, name) for p in parts]
        if all(x is None for x in masks):
            return None
        rows = zip(masks, parts, strict=True)
        return torch.cat([torch.full(p.input_ids.shape, default, dtype=dtype) if x is None else x for x, p in rows])

    parts = _numbered_on(parts)

    def numbers(name: str) -> Tensor | None:
        columns = [getattr(p, name) for p in parts]
        return None if any(c is None for c in columns) else torch.cat(columns)

    return Blocks(
        ids,
        [d for p in parts for d in p.domains],
        together("attention_mask", True, torch.bool),
        together("document_ids", 0, torch.int32),
        together("labels_mask", True, torch.bool),
        numbers("passages"),
        numbers("works"),
        together("prefix_mask", False, torch.bool),
        together("calls_mask", False, torch.bool),
    )


def _numbered_on(parts: list[Blocks]) -> list[Blocks]:
    """Return the parts with passages and works counted on from each to the next; None where one has no numbers.

    Where only some name works, those of the others are their passages.
    """
    if any(p.works is not None for p in parts):
        parts = [p if p.works is not None else replace(p, works=p.passages) for p in parts]
    shifts = {name: _shifts([getattr(p, name) for p in parts]) for name in _NUMBERED}
    numbered = []
    for i, part in enumerate(parts):
        columns = {name: _shifted(getattr(part, name), shift, i) for name, shift in shifts.items()}
        numbered.append(replace(part, **columns))
    return numbered


def _shifts(columns: list[Tensor | None]) -> list[int] | None:
    """Return what is added to each part's numbers, so that they go on from the part before; None where a part has none."""
    shifts: list[int] = []
    start = 0
    for column in columns:
        if column is None:
            return None
        low, high = int(column.min()), int(column.max())
        shifts.append(start - low)
        start += high - low + 1
    return shifts


def _shifted(column: Tensor | None, shifts: list[int] | None, part: int) -> Tensor | None:
    if column is None or shifts is None:
        return None
    return column + shifts[part] if shifts[part] else column


def _gathered(parts: list[Blocks], rows: Tensor) -> Blocks:
    """Return the rows [M] of several sets, one under the other, as one mapped set, in a file that goes when it is not used."""
    folder = next(p.folder for p in parts if p.folder is not None)
    length = parts[0].input_ids.shape[1]
    starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
    given = {name for name in _COLUMNS if any(getattr(p, name) is not None for p in parts)}
    shifts = {
        name: _shifts([p.passages if getattr(p, name) is None else getattr(p, name) for p in parts])
        for name in _NUMBERED
    }
    given -= {name for name, shift in shifts.items() if shift is None}
    masks = ("attention_mask", "labels_mask", "prefix_mask", "calls_mask")
    out = {n: empty_map((len(rows), length), torch.bool if n in masks else torch.int32, folder) for n in given}
    domains: list[str] = [""] * len(rows)
    size = max(1, _CHUNK // length)
    for start in range(0, len(rows), size):
        wanted = rows[start : start + size]
        for number, part in enumerate(parts):
            mine = torch.nonzero((wanted >= starts[number]) & (wanted < starts[number + 1])).flatten()
            if not len(mine):
                continue
            taken = part[wanted[mine] - starts[number]]
            for name, column in out.items():
                column[start + mine] = _column(taken, name, shifts.get(name), number).to(column.dtype)
            for place, domain in zip((start + mine).tolist(), taken.domains, strict=True):
                domains[place] = domain
    return Blocks(domains=domains, folder=folder, **out)  # type: ignore[arg-type]


def _column(blocks: Blocks, name: str, shifts: list[int] | None, part: int) -> Tensor:
    """Return one column of some blocks of a part, filled in where they have none."""
    column = getattr(blocks, name)
    if name == "works" and column is None:
        column = blocks.passages
    if column is not None:
        return column if shifts is None else column + shifts[part]
    return torch.full(blocks.input_ids.shape, int(name in ("attention_mask", "labels_mask")))
