"""Unpack weights that bitsandbytes quantised (NF4, FP4, LLM.int8) as they are read, without bitsandbytes.

On disk a 4-bit weight is a column of bytes, two values each, with these beside it: `absmax`, one scale per block; `quant_map`, the value of
each of the 16 codes; `quant_state.bitsandbytes__nf4`, JSON with shape and block size. With double quantisation (QLoRA, arXiv:2305.14314)
the scales are bytes themselves, with a `nested_absmax`, a `nested_quant_map` and an offset. An 8-bit weight has `SCB`, the largest magnitude
of each row.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint
from moe2dense.weights.formats.packed_weight import PackedWeight

_FOUR_BIT = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")
_EIGHT_BIT = re.compile(r"\.(SCB|weight_format)$")
_STATE = ".quant_state.bitsandbytes__"


def owner(key: str) -> str:
    """Return the weight that a peer tensor belongs to, or ''."""
    if _FOUR_BIT.search(key):
        return _FOUR_BIT.sub("", key)
    return _EIGHT_BIT.sub(".weight", key) if _EIGHT_BIT.search(key) else ""


def scale_of(key: str, present: set[str]) -> str:
    """Return the tensor with the scales of weight `key`, or '' when bitsandbytes did not quantise it."""
    rows = key.removesuffix("weight") + "SCB"
    return next((s for s in (key + ".absmax", rows) if s in present and s != key), "")


@dataclass(frozen=True)
class State:
    """What the JSON beside a 4-bit weight says."""

    shape: tuple[int, ...]
    block: int  # values to a scale
    nested_block: int  # scales to a scale of scales
    offset: float  # added to every scale


def read_state(checkpoint: Checkpoint, key: str) -> State:
    """Read the state of weight `key`. Raises UserError when it has none, or one that cannot be read."""
    info = checkpoint[key]
    name = next((key + _STATE + kind for kind in ("nf4", "fp4") if key + _STATE + kind in checkpoint.tensors), "")
    try:
        values: dict[str, Any] = json.loads(bytes(checkpoint.read(name).tolist())) if name else {}
        shape, block = tuple(int(n) for n in values["shape"]), int(values["blocksize"])
        return State(shape, block, int(values.get("nested_blocksize", 0)), float(values.get("nested_offset", 0.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint file {info.file}: tensor {key!r} has no readable quant_state of bitsandbytes"
        ) from error


def unpack_4bit(packed: Tensor, absmax: Tensor, code: Tensor, state: State) -> Tensor:
    """Unpack two codes a byte, high nibble first: packed [n / 2, 1] uint8, absmax [blocks], code [16] -> float32 of the state's shape."""
    flat = packed.flatten()
    values = code.float()[torch.stack((flat >> 4, flat & 15), -1).flatten().long()]
    count = torch.Size(state.shape).numel()
    scales = absmax.repeat_interleave(state.block)[:count]
    return (values[:count] * scales).view(state.shape)


def unpack_scales(stored: Tensor, nested: Tensor, code: Tensor, state: State) -> Tensor:
    """Unpack scales that were quantised in turn: stored [blocks] uint8, nested [ceil(blocks / nested_block)], code [256] -> float32 [blocks]."""
    wide = nested.repeat_interleave(state.nested_block)[: len(stored)]
    return code.float()[stored.long()] * wide + state.offset


def unpack_int8(weight: Tensor, largest: Tensor) -> Tensor:
    """Unpack [O, I] int8 and each row's largest magnitude [O] -> float32 [O, I]."""
    return weight.float() * (largest.float() / 127)[:, None]


def shape_of(checkpoint: Checkpoint, key: str) -> tuple[int, ...]:
    """Return the shape of weight `key` once unpacked."""
    info = checkpoint[key]
    return info.shape if info.dtype == torch.int8 else read_state(checkpoint, key).shape


def check_scales(checkpoint: Checkpoint, key: str) -> None:
    """Raise UserError where the tensors beside weight `key` are missing, or not as many values as unpacking it takes."""
    info = checkpoint[key]
    if info.dtype == torch.int8:
        wanted = {key.removesuffix("weight") + "SCB": info.shape[0]}
    else:
        state = read_state(checkpoint, key)
        values = torch.Size(state.shape).numel()
        blocks = -(-values // state.block) if state.block > 0 else 0
        wanted = {key: -(-values // 2), key + ".absmax": blocks, key + ".quant_map": 16}
        if checkpoint[key + ".absmax"].dtype == torch.uint8:
            nested = -(-blocks // state.nested_block) if state.nested_block > 0 else 0
            wanted |= {key + ".nested_absmax": nested, key + ".nested_quant_map": 256}
    for name, count in wanted.items():
        there = torch.Size(checkpoint[name].shape).numel()
        if there != count:
            raise UserError(
                f"checkpoint file {checkpoint[name].file}: tensor {name!r} has {there} values, unpacking {key!r} takes {count}"
            )


def read_weight(checkpoint: Checkpoint, key: str) -> Tensor:
    """Read weight `key` in float32. Raises UserError naming what is missing."""
    if checkpoint[key].dtype == torch.int8:
        return unpack_int8(checkpoint.read(key), checkpoint.read(key.removesuffix("weight") + "SCB"))
    state, scales = read_state(checkpoint, key), checkpoint.read(key + ".absmax")
    if scales.dtype == torch.uint8:
        nested, code = (checkpoint.read(f"{key}.nested_{part}") for part in ("absmax", "quant_map"))
        scales = unpack_scales(scales, nested, code, state)
    return unpack_4bit(checkpoint.read(key), scales.float(), checkpoint.read(key + ".quant_map"), state)


@dataclass(frozen=True)
class BitsandbytesWeight(PackedWeight):
    """tensors: the codes, their scales."""

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the shape, which the state beside a 4-bit weight says."""
        return shape_of(checkpoint, self.key)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError where the tensors beside the weight are missing, or not as many values as unpacking takes."""
        check_scales(checkpoint, self.key)

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the weight, and of it rows [start, stop)."""
        return read_weight(checkpoint, self.key)[start:stop]
