"""How a teacher's distributions are stored: four formats, each a function that writes and one that reads.

hidden   final hidden states, 2 bytes a number; with the head exact up to rounding; serves every loss
full     every log-probability, 2 bytes each; serves every loss
topk     the k likeliest tokens; the rest is one bucket; serves forward KL and hard labels
sampled  tokens drawn with replacement from the distribution; unbiased for forward KL (2503.16870)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe2dense.losses.teacher_rows import HiddenRows, LogitRows, SampledRows, TeacherRows, TopKRows

# N blocks, S block length, H hidden, V vocabulary, k stored tokens per position

FORMATS = ("hidden", "sampled", "topk", "full")
_CHUNK = 2**23  # logits held at a time


@dataclass(frozen=True)
class Options:
    """What a store was written with."""

    format: str = "hidden"
    temperature: float = 1.0  # of topk and sampled; the others serve any
    k: int = 32
    draws: int = 50  # of sampled, at most 255
    dtype: str = "bfloat16"  # of hidden
    seed: int = 0
    features: tuple[str, ...] = ()  # what is known of some layers rides along, by name (modeling/hooks.py)
    routing: tuple[str, ...] = ()  # and how the teacher routed each token, by name (distillation/targets/record.py)


def _pieces(hidden: Tensor, head: Any) -> Iterator[tuple[slice, Tensor]]:
    """Logits of a few tokens at a time: rows of [n, H], logits [r, V] in float32."""
    flat = hidden.flatten(0, 1)
    step = max(1, _CHUNK // head.weight.shape[0])
    for start in range(0, len(flat), step):
        rows = slice(start, min(start + step, len(flat)))
        yield rows, head.logits(flat[rows].to(head.weight.dtype)).float()


def _id_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 2**16 else torch.int32


def write_hidden(hidden: Tensor, head: Any, options: Options, first: int) -> dict[str, Tensor]:
    return {"hidden": hidden.to(getattr(torch, options.dtype))}


def write_full(hidden: Tensor, head: Any, options: Options, first: int) -> dict[str, Tensor]:
    parts = [logits.log_softmax(-1).clamp(min=-6e4).half() for _, logits in _pieces(hidden, head)]
    return {"log_p": torch.cat(parts).view(*hidden.shape[:2], -1)}


def write_topk(hidden: Tensor, head: Any, options: Options, first: int) -> dict[str, Tensor]:
    found = [(logits / options.temperature).log_softmax(-1).topk(options.k) for _, logits in _pieces(hidden, head)]
    shape = (*hidden.shape[:2], options.k)
    ids = torch.cat([f.indices for f in found]).to(_id_dtype(head.weight.shape[0]))
    return {"ids": ids.view(shape), "log_p": torch.cat([f.values for f in found]).clamp(min=-6e4).half().view(shape)}


def write_sampled(hidden: Tensor, head: Any, options: Options, first: int) -> dict[str, Tensor]:
    """first: the place of the first block in the store. Every block has draws of its own, however the text is cut."""
    ids, counts, sizes, entropy = [], [], [], []
    for i in range(len(hidden)):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + first + i)
        for _, logits in _pieces(hidden[i : i + 1], head):
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
        "ids": torch.cat(ids).to(_id_dtype(head.weight.shape[0])),
        "counts": torch.cat(counts).to(torch.uint8),
        "sizes": size.to(torch.uint8).view(shape),
        "offsets": offsets,
        "entropy": torch.cat(entropy).half().view(shape),
    }


def write_features(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is known of some layers [N, S, ..., D], in 8 bits a number with one scale per token (and head)."""
    found = {}
    for name, states in features.items():
        scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        found[f"feature-{name}"] = (states.float() / scale).round().to(torch.int8)
        found[f"scale-{name}"] = scale[..., 0]
    return found


def read_features(shard: Any, row: int, names: Sequence[str]) -> dict[str, Tensor]:
    """What `write_features` wrote of one block: values [S, ..., D] by name. Attention maps sum to 1 again."""
    found = {}
    for name in names:
        value = shard.get_slice(f"feature-{name}")[row].float() * shard.get_slice(f"scale-{name}")[row].unsqueeze(-1)
        found[name] = value / value.sum(-1, keepdim=True) if name.startswith("maps-") else value
    return found


WRITERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "hidden": write_hidden,
    "full": write_full,
    "topk": write_topk,
    "sampled": write_sampled,
}


def read_block(shard: Any, row: int, format: str) -> dict[str, Tensor]:
    """The tensors of one block of an open shard (safetensors' `safe_open`)."""
    if format != "sampled":
        names = {"hidden": ("hidden",), "full": ("log_p",), "topk": ("ids", "log_p")}[format]
        return {n: shard.get_slice(n)[row] for n in names}
    a, b = shard.get_slice("offsets")[row : row + 2].tolist()
    ragged = {n: shard.get_slice(n)[a:b] for n in ("ids", "counts")}
    return ragged | {n: shard.get_slice(n)[row] for n in ("sizes", "entropy")}


def to_rows(blocks: list[dict[str, Tensor]], options: Options, head: Any) -> TeacherRows:
    """What the loss reads, from the tensors of some blocks."""
    if options.format == "hidden":
        return HiddenRows(torch.cat([b["hidden"] for b in blocks]), head)
    if options.format == "full":
        return LogitRows(torch.cat([b["log_p"] for b in blocks]))
    if options.format == "topk":
        ids, log_p = (torch.cat([b[n] for b in blocks]) for n in ("ids", "log_p"))
        return TopKRows(ids.long(), log_p.float(), temperature=options.temperature)
    return _sampled_rows(blocks, options)


def _sampled_rows(blocks: list[dict[str, Tensor]], options: Options) -> SampledRows:
    """Ragged draws padded to the longest position, with weight 0."""
    sizes = torch.cat([b["sizes"] for b in blocks]).long()
    place = torch.arange(int(sizes.max()))[None] < sizes[:, None]
    ids, weights = torch.zeros(place.shape, dtype=torch.int64), torch.zeros(place.shape)
    ids[place] = torch.cat([b["ids"] for b in blocks]).long()
    weights[place] = torch.cat([b["counts"] for b in blocks]).float() / options.draws
    entropy = torch.cat([b["entropy"] for b in blocks]).float()
    return SampledRows(ids, weights, entropy, options.temperature)
