"""How a teacher's distributions are stored: a class for each format writes tensors and reads them as rows.

registry.py lists them. Features and token weights (record.py) are stored with any format that holds them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.common.counters import count_disk
from moe2dense.losses.teacher_rows import HiddenRows, LogitRows, SampledRows, TeacherRows, TopKRows
from moe2dense.modeling.head import OutputHead

# N blocks, S block length, H hidden, V vocabulary, k stored tokens per position

_CHUNK = 2**23  # logits that are in memory at a time
_SCALE_GROUP = 64  # numbers of a feature that share a scale
FEATURE_BYTES = 1 + 4 / _SCALE_GROUP  # of a number of a feature: 8 bits, and its part of a float32 scale

# tensors of one block, or of the blocks of a shard, by name
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StoreOptions:
    """What a store was written with.

    temperature: of topk and sampled, the others serve any; k: of topk; draws: of sampled, at most 255; dtype: of hidden;
    features: of the teacher's layers, by name (modeling/hooks.py); routing: names of token weights.
    """

    format: str = "hidden"
    temperature: float = 1.0
    k: int = 32
    draws: int = 50
    dtype: str = "bfloat16"
    seed: int = 0
    features: tuple[str, ...] = ()
    routing: tuple[str, ...] = ()


class Format(ABC):
    """One way to store distributions, with the options of one store."""

    name: ClassVar[str]

    def __init__(self, options: StoreOptions):
        self.options = options

    @abstractmethod
    def write(self, hidden: Tensor, head: OutputHead, first: int) -> Tensors:
        """Return the tensors of a shard from hidden states [N, S, H]; first: the place of its first block in the store."""

    @abstractmethod
    def bytes_per_token(self, hidden_size: int, vocabulary: int) -> int:
        """Return about how many bytes a position takes, for the size of shards."""

    @abstractmethod
    def rows(self, blocks: Sequence[Tensors], head: OutputHead | None) -> TeacherRows:
        """Return what the loss reads, from the tensors of some blocks."""

    @abstractmethod
    def read(self, shard: Any, row: int) -> Tensors:
        """Return the tensors of one block of an open shard (safetensors' `safe_open`)."""


class HiddenFormat(Format):
    """Final hidden states, 2 bytes a number."""

    name = "hidden"

    def write(self, hidden: Tensor, head: OutputHead, first: int) -> Tensors:
        return {"hidden": hidden.to(getattr(torch, self.options.dtype))}

    def bytes_per_token(self, hidden_size: int, vocabulary: int) -> int:
        return 2 * hidden_size

    def read(self, shard: Any, row: int) -> Tensors:
        return _slices(shard, row, ("hidden",))

    def rows(self, blocks: Sequence[Tensors], head: OutputHead | None) -> HiddenRows:
        assert head is not None
        return HiddenRows(_joined(blocks, "hidden"), head)


class FullFormat(Format):
    """Every log-probability, 2 bytes each."""

    name = "full"

    def write(self, hidden: Tensor, head: OutputHead, first: int) -> Tensors:
        parts = [logits.log_softmax(-1).clamp(min=-6e4).half() for logits in _logits_in_parts(hidden, head)]
        return {"log_p": torch.cat(parts).view(*hidden.shape[:2], -1)}

    def bytes_per_token(self, hidden_size: int, vocabulary: int) -> int:
        return 2 * vocabulary

    def read(self, shard: Any, row: int) -> Tensors:
        return _slices(shard, row, ("log_p",))

    def rows(self, blocks: Sequence[Tensors], head: OutputHead | None) -> LogitRows:
        return LogitRows(_joined(blocks, "log_p"))


class TopKFormat(Format):
    """The k likeliest tokens; the rest is one bucket."""

    name = "topk"

    def write(self, hidden: Tensor, head: OutputHead, first: int) -> Tensors:
        options = self.options
        top = [(x / options.temperature).log_softmax(-1).topk(options.k) for x in _logits_in_parts(hidden, head)]
        shape = (*hidden.shape[:2], options.k)
        ids = torch.cat([t.indices for t in top]).to(id_dtype(head.weight.shape[0]))
        log_p = torch.cat([t.values for t in top]).clamp(min=-6e4).half()
        return {"ids": ids.view(shape), "log_p": log_p.view(shape)}

    def bytes_per_token(self, hidden_size: int, vocabulary: int) -> int:
        return 6 * self.options.k

    def read(self, shard: Any, row: int) -> Tensors:
        return _slices(shard, row, ("ids", "log_p"))

    def rows(self, blocks: Sequence[Tensors], head: OutputHead | None) -> TopKRows:
        ids, log_p = _joined(blocks, "ids"), _joined(blocks, "log_p")
        return TopKRows(ids.long(), log_p.float(), temperature=self.options.temperature)


class SampledFormat(Format):
    """Tokens drawn with replacement from the distribution, unbiased for forward KL (2503.16870)."""

    name = "sampled"

    def write(self, hidden: Tensor, head: OutputHead, first: int) -> Tensors:
        """Draw for every block from a generator of its own, so that a store does not depend on where its shards begin."""
        options, ids, counts, sizes, entropy = self.options, [], [], [], []
        for i in range(len(hidden)):
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + first + i)
            for logits in _logits_in_parts(hidden[i : i + 1], head):
                log_p = (logits / options.temperature).log_softmax(-1)
                p = log_p.exp()
                entropy.append(-(p * log_p).sum(-1))
                drawn = torch.multinomial(p.cpu(), options.draws, replacement=True, generator=generator).sort(-1).values
                new = torch.ones_like(drawn, dtype=torch.bool)
                new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
                ids.append(drawn[new])
                starts = new.flatten().nonzero()[:, 0]
                counts.append(torch.diff(starts, append=starts.new_tensor([drawn.numel()])))
                sizes.append(new.sum(-1))
        shape, size = hidden.shape[:2], torch.cat(sizes)
        offsets = torch.zeros(len(hidden) + 1, dtype=torch.int64)
        offsets[1:] = size.view(shape).sum(1).cumsum(0)
        return {
            "ids": torch.cat(ids).to(id_dtype(head.weight.shape[0])),
            "counts": torch.cat(counts).to(torch.uint8),
            "sizes": size.to(torch.uint8).view(shape),
            "offsets": offsets,
            "entropy": torch.cat(entropy).half().view(shape),
        }

    def bytes_per_token(self, hidden_size: int, vocabulary: int) -> int:
        return 3 * self.options.draws

    def read(self, shard: Any, row: int) -> Tensors:
        start, stop = shard.get_slice("offsets")[row : row + 2].tolist()
        ragged = {n: shard.get_slice(n)[start:stop] for n in ("ids", "counts")}
        count_disk(sum(value.nbytes for value in ragged.values()))
        return ragged | _slices(shard, row, ("sizes", "entropy"))

    def rows(self, blocks: Sequence[Tensors], head: OutputHead | None) -> SampledRows:
        """Pad ragged draws to the longest position, with weight 0."""
        sizes = _joined(blocks, "sizes").long()
        used = torch.arange(int(sizes.max()))[None] < sizes[:, None]
        ids, weights = torch.zeros(used.shape, dtype=torch.int64), torch.zeros(used.shape)
        ids[used] = _joined(blocks, "ids").long()
        weights[used] = _joined(blocks, "counts").float() / self.options.draws
        return SampledRows(ids, weights, _joined(blocks, "entropy").float(), self.options.temperature)


def written_temperature(rows: TeacherRows | None) -> float | None:
    """Return the temperature of rows that were written at one; None for rows that serve any."""
    return rows.temperature if isinstance(rows, (TopKRows, SampledRows)) else None


def write_features(features: Tensors) -> Tensors:
    """Return features [N, S, ..., D] in 8 bits a number, with one scale for each 64 numbers of a token (and head).

    A channel that is a thousand times larger than the others (an attention sink's) costs only its own group their digits.
    """
    tensors = {}
    for name, states in features.items():
        groups = _in_groups(states.float())
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        rounded = (groups / scale).round().to(torch.int8)
        tensors[f"feature-{name}"] = rounded.flatten(-2)[..., : states.shape[-1]].contiguous()
        tensors[f"scale-{name}"] = scale[..., 0]
    return tensors


def _in_groups(states: Tensor) -> Tensor:
    """Return values [..., D] as [..., groups, 64], zeros after the last."""
    size = states.shape[-1]
    return F.pad(states, (0, -size % _SCALE_GROUP)).unflatten(-1, (-1, _SCALE_GROUP))


def read_features(shard: Any, row: int, names: Sequence[str]) -> Tensors:
    """Read what `write_features` wrote of one block: values [S, ..., D] by name. Attention maps sum to 1 again."""
    features = {}
    for name in names:
        stored, scale = _slices(shard, row, (f"feature-{name}", f"scale-{name}")).values()
        rounded = stored.float()
        value = rounded * scale.repeat_interleave(_SCALE_GROUP, -1)[..., : rounded.shape[-1]]
        features[name] = value / value.sum(-1, keepdim=True) if name.startswith("maps-") else value
    return features


def _logits_in_parts(hidden: Tensor, head: OutputHead) -> Iterator[Tensor]:
    """Yield the logits [r, V] in float32 of hidden [N, S, H], a few tokens at a time."""
    flat = hidden.flatten(0, 1)
    step = max(1, _CHUNK // head.weight.shape[0])
    for start in range(0, len(flat), step):
        yield head.logits(flat[start : start + step].to(head.weight)).float()


def id_dtype(vocabulary: int) -> torch.dtype:
    """Return the smallest dtype that holds every id of a vocabulary."""
    return torch.uint16 if vocabulary <= 2**16 else torch.int32


def _slices(shard: Any, row: int, names: Sequence[str]) -> Tensors:
    values = {n: shard.get_slice(n)[row] for n in names}
    count_disk(sum(value.nbytes for value in values.values()))
    return values


def _joined(blocks: Sequence[Tensors], name: str) -> Tensor:
    return torch.cat([block[name] for block in blocks])
