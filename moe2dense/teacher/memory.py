"""Memory budgets, the buffers of hidden states that spill to a file beyond them, and memory that is used again."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from moe2dense.common.units import parse_bytes, show_bytes
from moe2dense.errors import UserError
from moe2dense.modeling.internals import saved_tensors
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.skeleton import Skeleton

_LEAST = 16_000_000  # a budget below this holds no layer of anything


def memory_budget(memory: str | int | float, device: torch.device) -> int:
    """Bytes for weights and hidden states. `auto` is half of the free memory of the device that computes."""
    if memory == "auto":
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 2
        return psutil.virtual_memory().available // 2
    budget = parse_bytes(memory, "memory")
    if budget < _LEAST:
        raise UserError(f"memory must be at least {show_bytes(_LEAST)}; found {memory!r}")
    return budget


WORK_BYTES = 96_000_000  # slices of converted weights, activations of a chunk


_CHUNK_TOKENS = 2048


LEAST_MACRO_BATCH = 4096  # below this, hidden states spill rather than the weights being read more often


_BUFFERS = 5  # hidden states before and after, mixer output, block input and output


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes and tokens of a teacher's run within its budget."""

    total_bytes: int  # the whole model in the compute dtype
    resident: bool  # the whole model stays in memory in the compute dtype
    drop_pages: bool  # the checkpoint is larger than the page cache can be
    layer_bytes: int  # the largest layer without its routed experts, in the compute dtype
    expert_bytes: int  # the largest expert as stored
    prefetch_bytes: int
    hidden_bytes: int  # what is left for hidden states
    macro_batch: int  # tokens per read of the weights
    chunk_tokens: int  # tokens through a decoder layer at once


def plan_memory(skeleton: Skeleton, layers: Sequence[Layer], budget: int) -> MemoryPlan:
    """Split a budget of bytes; see MemoryPlan."""
    shapes = skeleton.shapes
    compute = skeleton.dtype.itemsize
    total = sum(t.numel() * compute for t in saved_tensors(skeleton.model).values())
    layer_bytes = max(sum(shapes[layer.prefix + n].numel() for n in layer.names) * compute for layer in layers)
    sparse = [layer for layer in layers if layer.experts is not None]
    expert_bytes = max((layer.experts.nbytes(0) for layer in sparse if layer.experts), default=0)
    resident = total <= budget // 2
    weights = total if resident else layer_bytes + 2 * expert_bytes
    left = max(budget - weights - WORK_BYTES, budget // 8)
    prefetch = 2 * expert_bytes + (0 if resident else min(left // 4, 2 * expert_bytes))
    left -= max(0, prefetch - 2 * expert_bytes)
    per_token = skeleton.hidden_size * compute * _BUFFERS
    return MemoryPlan(
        total_bytes=total,
        resident=resident,
        drop_pages=skeleton.checkpoint.nbytes > psutil.virtual_memory().total // 2,
        layer_bytes=layer_bytes,
        expert_bytes=expert_bytes,
        prefetch_bytes=prefetch,
        hidden_bytes=left,
        macro_batch=max(LEAST_MACRO_BATCH, left // per_token),
        chunk_tokens=_CHUNK_TOKENS,
    )
