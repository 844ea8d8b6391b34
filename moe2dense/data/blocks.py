"""Hold blocks of tokens with their masks, documents and domains; derive labels and the positions that count."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor


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

    def __post_init__(self) -> None:
        assert self.input_ids.dim() == 2 and self.input_ids.dtype == torch.int64, "input_ids must be [N, S] int64"
        self.domains = list(self.domains) or [""] * len(self.input_ids)
        assert len(self.domains) == len(self.input_ids), "one domain per block"

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice | list[int] | Tensor) -> "Blocks":
        rows = torch.arange(len(self))[index]
        optional = (self.attention_mask, self.document_ids, self.labels_mask, self.passages, self.works)
        optional += (self.prefix_mask, self.calls_mask)
        return Blocks(
            self.input_ids[rows],
            [self.domains[i] for i in rows.tolist()],
            *(None if x is None else x[rows] for x in optional),
        )

    @property
    def tokens(self) -> int:
        """Return how many real tokens there are."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def labels(self) -> Tensor:
        """Return [N, S] int64: the token that follows each position, -100 where there is none or it is not to be learnt."""
        labels = torch.full_like(self.input_ids, -100)
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
        parts = [x.numpy() for x in (self.input_ids, self.attention_mask, self.document_ids) if x is not None]
        return [xxhash.xxh3_128_hexdigest(b"".join(p[i].tobytes() for p in parts)) for i in range(len(self))]


def right_padded(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (ids [N, W] int64, mask [N, W] bool) of rows of token ids, filled up with 0 to the longest or to `width`."""
    width = max(map(len, rows), default=0) if width is None else width
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def join_blocks(parts: list[Blocks]) -> Blocks:
    """Join several sets of blocks of one length; a mask that only some have is filled in for the others."""
    ids = torch.cat([p.input_ids for p in parts])
    any_works = any(p.works is not None for p in parts)

    def together(name: str, default: int | bool, dtype: torch.dtype) -> Tensor | None:
        masks = [getattr(p, name) for p in parts]
        if all(x is None for x in masks):
            return None
        rows = zip(masks, parts, strict=True)
        return torch.cat([torch.full(p.input_ids.shape, default, dtype=dtype) if x is None else x for x, p in rows])

    return Blocks(
        ids,
        [d for p in parts for d in p.domains],
        together("attention_mask", True, torch.bool),
        together("document_ids", 0, torch.int32),
        together("labels_mask", True, torch.bool),
        _numbered_on([p.passages for p in parts]),
        _numbered_on([p.passages if p.works is None else p.works for p in parts]) if any_works else None,
        together("prefix_mask", False, torch.bool),
        together("calls_mask", False, torch.bool),
    )


def _numbered_on(parts: list[Tensor | None]) -> Tensor | None:
    """Return the numbers of several texts [N, S] one under the other, each text's counted on from the last; None where one has none."""
    numbered: list[Tensor] = []
    for part in parts:
        if part is None:
            return None
        start = int(numbered[-1].max()) + 1 if numbered else 0
        numbered.append(part - part.min() + start)
    return torch.cat(numbered)
