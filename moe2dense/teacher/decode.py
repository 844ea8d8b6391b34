"""Decode layer by layer: one pass over the weights extends every sequence by one token, keys and values stay in memory.

A token of one sequence needs the whole model, so decoding a single sequence from disk is hopeless; a thousand sequences share each read.
The schedule is that of FlexGen (arXiv:2303.06865).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from moe2dense.common.units import show_bytes
from moe2dense.errors import UserError
from moe2dense.families.fields import config_field
from moe2dense.modeling import internals
from moe2dense.teacher.buffers import Arena, SpillFolder
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.stream import Stream

# B sequences, S prompt length (left-padded), V vocabulary, H hidden

_GROUP_TOKENS = 2  # groups hold this many times the tokens that a layer is run on at once


@dataclass
class _Group:
    """Sequences that share a cache: mask [b, tokens so far], 0 = left padding."""

    cache: Cache
    mask: Tensor


class _CachedStream(Stream):
    """One pass over the layers for the newest tokens [B, s] of all groups; their caches grow by s."""

    def __init__(self, teacher: Teacher, ids: Tensor, groups: list[_Group]):
        arena = Arena(teacher.plan.hidden_bytes // 2, teacher.device, SpillFolder(), teacher.plan.ram_bytes)
        super().__init__(teacher, teacher.layers, teacher.runtime, teacher.chunk_tokens, ids, None, None, [], arena)
        self.groups = groups
        self.token_mask = torch.cat([g.mask[:, -ids.shape[1] :] for g in groups]).reshape(-1).bool()
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def chunks(self) -> list[slice]:
        """Return the rows of each group."""
        stops = list(accumulate(len(group.mask) for group in self.groups))
        return [slice(a, b) for a, b in pairwise([0, *stops])]

    def layer_inputs(self, index: int, rows: slice) -> dict[str, Any]:
        """Return the keyword arguments of decoder layer `index` for a group, its cache among them."""
        return self._arguments[rows.start][index]

    @torch.no_grad()
    def _embed(self, out: Tensor) -> None:
        """Write what enters the first layer to `out`, and note the arguments of every layer."""
        length, device = self.shape[1], self.skeleton.device
        chunks = self.chunks()
        for group, rows, vectors in zip(self.groups, chunks, self.skeleton.embeddings(self.ids, chunks), strict=True):
            calls: list[dict[str, Any]] = []
            first: list[Tensor] = []

            def note(
                index: int,
                hidden: Tensor,
                arguments: dict[str, Any],
                calls: list[Any] = calls,
                first: list[Any] = first,
            ) -> Tensor:
                first.append(hidden)
                calls.append(arguments)
                return hidden

            mask = group.mask.to(device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
            internals.run_body(self.skeleton.body, vectors, mask, positions, note, group.cache)
            self._arguments[rows.start] = calls
            out[rows] = first[0].to(out.device)


class Decoder:
    """Sequences being continued together. `prefill` runs their prompts, `step` one more token of each.

    Sequences are numbered by their place; `select` keeps some of them, in order, or repeats and reorders neighbours (beams).
    """

    def __init__(self, teacher: Teacher, prompts: Sequence[Sequence[int]]):
        assert prompts and all(len(p) for p in prompts), "every prompt has a token"
        self.teacher, self.prompts = teacher, prompts
        self.groups: list[_Group] = []

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Return next-token logits [B, V] of every prompt."""
        longest = max(map(len, self.prompts))
        ids = torch.zeros(len(self.prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(self.prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[i, longest - len(prompt) :] = 1
            ids[i, : longest - len(prompt)] = prompt[0]  # any id that is in use: padding is masked
        size = max(1, _GROUP_TOKENS * self.teacher.chunk_tokens // longest)
        config = self.teacher.body.config
        self.groups = [_Group(internals.new_cache(config), part) for part in mask.split(size)]
        return self._logits(ids)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [B]; return the logits [B, V] that follow them."""
        start = 0
        for group in self.groups:
            group.mask = torch.cat([group.mask, torch.ones(len(group.mask), 1, dtype=torch.int64)], 1)
            start += len(group.mask)
        assert start == len(tokens)
        return self._logits(tokens[:, None])

    def _logits(self, ids: Tensor) -> Tensor:
        """Run the newest tokens [B, s] through all layers; return the logits [B, V] after the last."""
        stream = _CachedStream(self.teacher, ids, self.groups)
        for _ in stream:
            pass
        assert stream.hidden_states is not None
        return self.teacher.head.logits(stream.hidden_states[:, -1]).float().cpu()

    def select(self, index: Tensor) -> None:
        """Continue with the sequences `index` [m] only, ascending in the groups they are in."""
        start, groups = 0, []
        for group in self.groups:
            mine = index[(index >= start) & (index < start + len(group.mask))] - start
            start += len(group.mask)
            if not len(mine):
                continue
            if len(mine) != len(group.mask) or not torch.equal(mine, torch.arange(len(mine))):
                group.cache.reorder_cache(mine.to(self.teacher.device))  # type: ignore[arg-type]
                group.mask = group.mask[mine]
            groups.append(group)
        self.groups = groups


def cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Return the bytes of keys and values of one token of one sequence, over all layers (an upper bound where windows slide)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None):  # latent attention keeps its compressed form
        width = text.kv_lora_rank + text.qk_rope_head_dim
    else:
        size = config_field(text, "head_dim") or text.hidden_size // heads
        width = 2 * size * (config_field(text, "num_key_value_heads") or heads)
    return int(width) * itemsize * int(text.num_hidden_layers)


def sequences_that_fit(teacher: Teacher, tokens: int) -> int:
    """Return how many sequences of `tokens` tokens the memory budget can decode at once. Raises UserError when not even one."""
    room = teacher.plan.hidden_bytes // 2
    each = tokens * cache_bytes(teacher.config, teacher.dtype.itemsize)
    if room < each:
        raise UserError(
            f"memory: keys and values of one sequence of {tokens} tokens need {show_bytes(each)} and {show_bytes(room)} are left "
            "for them; raise --memory, or write shorter texts"
        )
    return room // each
