"""Count the bytes of attention masks: dense ones, and what SDPA keeps of them for the backward pass, or tiles. No torch here."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# N blocks, S block length
TILE = 128  # queries and keys of a tile
_INDEX = 4  # bytes
_LISTS = 4  # of tiles: seen in part and whole, by row and by column


@dataclass(frozen=True)
class MaskUse:
    """Where masks are needed and how they are made. documents: blocks hold several that do not see each other; tiles: no dense masks."""

    documents: bool = False
    tiles: bool = False


NO_DOCUMENTS = MaskUse()


def dense_bytes(blocks: int, length: int, kinds: int = 1, copies: int = 0, itemsize: int = 4) -> int:
    """Return the bytes of dense masks [N, 1, S, S]: a bool for each kind, and copies as numbers, which SDPA adds to the scores."""
    return blocks * length**2 * (kinds + copies * itemsize)


def tile_bytes(blocks: int, length: int, kinds: int = 1) -> int:
    """Return the bytes of masks of tiles: of each row and column of tiles how many are seen, and which."""
    tiles = math.ceil(length / TILE)
    return blocks * kinds * _LISTS * _INDEX * (tiles + tiles**2)


def masked_layers(config: "PreTrainedConfig", length: int, documents: bool) -> list[str]:
    """Return the kind of each layer that needs a mask for whole blocks of this length: `full` or `window`.

    Plain causal attention needs none; a window does where a block is longer than it.
    """
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    usual = "full_attention" if window is None else "sliding_attention"
    types = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    kinds = [
        "window" if any(w in t for w in ("sliding", "chunked")) else "full"
        for t in types
        if "attention" in t and "linear" not in t
    ]
    return [kind for kind in kinds if documents or (kind == "window" and window is not None and window <= length)]


def mask_bytes(config: "PreTrainedConfig", use: MaskUse, blocks: int, length: int, itemsize: int, again: bool) -> int:
    """Return the bytes of the masks that a training pass of a model over so many blocks holds.

    itemsize: of the numbers in which it attends. again: activations are computed again, so that one layer's copy is there at a time.
    """
    layers = masked_layers(config, length, use.documents)
    kinds = len(set(layers))
    if use.tiles:
        return tile_bytes(blocks, length, kinds)
    return dense_bytes(blocks, length, kinds, min(len(layers), 1) if again else len(layers), itemsize)
