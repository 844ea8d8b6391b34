"""How often tokens occur in a text, and which tokens of another text are rare by that count."""

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks

# V vocabulary, N blocks, S block length, n tokens

GROUPS = 10


def count_tokens(blocks: Blocks, size: int = 0) -> Tensor:
    """Return how often each token id occurs among the real tokens [V]; at least `size` ids."""
    total = torch.zeros(size, dtype=torch.int64)
    for part in blocks.in_parts():
        mask = part.attention_mask
        ids = part.input_ids.flatten() if mask is None else part.input_ids[mask.bool()]
        counts = torch.bincount(ids, minlength=len(total))
        counts[: len(total)] += total
        total = counts
    return total


def frequency_deciles(labels: Tensor, counts: Tensor | None = None, groups: int = GROUPS) -> Tensor:
    """Return the tenth of token frequency [n] of each of `labels` [n], 0 = rarest; the same id is always in the same tenth.

    counts [V]: how often each id occurs in the text that says what is rare, 0 beyond its end; by default, among `labels`.
    Ids are ordered by their count, then by id, and cut so that the groups have about equally many of `labels`. Where a few
    ids are very frequent some groups stay empty.
    """
    size = int(labels.max()) + 1
    here = torch.bincount(labels, minlength=size)
    known = torch.zeros(size, dtype=torch.int64)
    source = here if counts is None else counts[:size].cpu().long()
    known[: len(source)] = source
    order = known.sort(stable=True).indices
    mass = here[order].double()
    middle = mass.cumsum(0) - mass / 2
    group = torch.empty(size, dtype=torch.int64)
    group[order] = (middle / mass.sum() * groups).long().clamp(max=groups - 1)
    return group[labels]


def rare_labels(blocks: Blocks, counts: Tensor) -> Tensor:
    """Return [N, S] bool: positions whose next token is in the tenth of this text's tokens that is rarest by `counts` [V]."""
    labels = blocks.labels()
    rare = labels >= 0
    if bool(rare.any()):
        rare[rare.clone()] = frequency_deciles(labels[rare], counts) == 0
    return rare
