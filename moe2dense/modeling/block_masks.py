"""Attention masks as tiles: torch's BlockMask, made in little memory, and attention through one where no kernel trains with it.

A dense mask has a number for every pair of tokens. A BlockMask says for every tile of 128 by 128 pairs whether none, all or some of
them are seen, and keeps the rule that decides on a pair. torch's flex attention reads both on a GPU. On a CPU it cannot be
trained; there `attend_by_rows` computes the same, some queries at a time, and leaves out the keys that none of them sees.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from moe2dense.modeling.mask_memory import TILE

# N blocks, S block length, h heads, g heads of keys, D width of queries and keys, V width of values, q queries, k keys
# (block, head, query, key), which broadcast -> bool: whether the query sees the key
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_PAIRS = 2**22  # of tokens that a rule decides on at once
_QUERIES = 256  # that attend at once


def make_block_mask(rule: MaskRule, blocks: int, length: int, device: torch.device) -> BlockMask:
    """Return the mask of a rule for blocks [N, S]. The rule is asked for some rows at a time: no [S, S] tensor is made."""
    tiles = math.ceil(length / TILE)
    step = TILE * max(1, _PAIRS // (blocks * length * TILE))
    parts = [_seen_pairs(rule, blocks, range(a, min(a + step, length)), length, device) for a in range(0, length, step)]
    seen = torch.cat(parts, 1)  # [N, tiles, tiles]
    whole, some = seen == TILE * TILE, (seen > 0) & (seen < TILE * TILE)
    assert seen.shape == (blocks, tiles, tiles)
    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=TILE, mask_mod=rule, seq_lengths=(length, length)
    )


def _seen_pairs(rule: MaskRule, blocks: int, rows: range, length: int, device: torch.device) -> Tensor:
    """Return [N, tiles of these rows, tiles]: how many pairs of each tile are seen."""
    seen = rule(*_indices(range(blocks), rows, range(length), device)).expand(blocks, 1, len(rows), length)[:, 0]
    padded = F.pad(seen, (0, -length % TILE, 0, -len(rows) % TILE))
    return padded.unflatten(2, (-1, TILE)).sum(3, dtype=torch.int32).unflatten(1, (-1, TILE)).sum(2)


def _indices(blocks: range, rows: range, keys: range, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (block, head, query, key) for a rule, in the shapes [N, 1, 1, 1], [1, 1, 1, 1], [1, 1, q, 1] and [1, 1, 1, k]."""
    block, query, key = (torch.arange(r.start, r.stop, device=device) for r in (blocks, rows, keys))
    head = torch.zeros(1, dtype=torch.int64, device=device)
    return block[:, None, None, None], head[:, None, None, None], query[None, None, :, None], key[None, None, None, :]


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([N, 1, rows] how many tiles [N, rows, columns] of each row are set, [N, 1, rows, columns] their columns first)."""
    order = tiles.int().argsort(dim=2, descending=True, stable=True)
    return tiles.sum(2, dtype=torch.int32)[:, None], order.int()[:, None]


def mask_nbytes(mask: BlockMask | Tensor | None) -> int:
    """Return the bytes of a mask's own tensors."""
    if mask is None:
        return 0
    if isinstance(mask, Tensor):
        return mask.untyped_storage().nbytes()
    return sum(part.nbytes for part in mask.as_tuple() if isinstance(part, Tensor))


@torch.compiler.disable()
def attend_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention [N, h, S, V] of query [N, h, S, D], key [N, g, S, D] and value [N, g, S, V] through a mask.

    sinks [h]: a score of each head that takes its share of the softmax and has no value. What the backward pass needs of the pairs is
    computed again there, so that nothing of [S, S] is kept.
    """
    blocks, length = len(query), query.shape[2]
    tiles = mask.to_dense()[:, 0].bool().cpu()
    outputs = []
    for n in range(blocks):
        parts = []
        for a in range(0, length, _QUERIES):
            rows = range(a, min(a + _QUERIES, length))
            columns = tiles[n, rows.start // TILE : math.ceil(rows.stop / TILE)].any(0).nonzero().flatten().tolist()
            if not columns:  # padding that sees nothing
                parts.append(value.new_zeros(1, query.shape[1], len(rows), value.shape[3]))
                continue
            keys = range(columns[0] * TILE, min((columns[-1] + 1) * TILE, length))
            own = query[n : n + 1, :, rows.start : rows.stop]
            seen = (x[n : n + 1, :, keys.start : keys.stop] for x in (key, value))
            attend = functools.partial(_attend, mask.mask_mod, (n, rows, keys), scale, softcap)
            parts.append(checkpoint(attend, own, *seen, sinks, use_reentrant=False, preserve_rng_state=False))
        outputs.append(torch.cat(parts, 2))
    return torch.cat(outputs)


def _attend(
    rule: MaskRule,
    where: tuple[int, range, range],
    scale: float | None,
    softcap: float | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Return the attention of some queries of a block on some of its keys. where: (block, queries, keys)."""
    block, rows, keys = where
    seen = rule(*_indices(range(block, block + 1), rows, keys, query.device)).expand(1, 1, len(rows), len(keys))
    return masked_attention(query, key, value, seen, scale, softcap, sinks)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention [N, h, q, V] through a dense mask [N, 1, q, k] bool; arguments as of `attend_by_rows`."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(3, dtype=precision).to(value.dtype)[..., : key.shape[2]]
    return weights @ value
