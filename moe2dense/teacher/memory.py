"""Split a memory budget for a teacher whose checkpoint is there: which weights stay, how many tokens share one reading."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from moe2dense.modeling.internals import saved_tensors
from moe2dense.teacher.cost import HIDDEN_COPIES, split_budget
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.skeleton import Skeleton

_CHUNK_TOKENS = 2048  # tokens through a decoder layer at once


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes and tokens of a teacher's run within its budget."""

    total_bytes: int  # the whole model in the compute dtype
    resident: bool  # the whole model stays in memory in the compute dtype
    drop_pages: bool  # the checkpoint is larger than the page cache can be
    layer_bytes: int  # the largest layer without its routed experts, in the compute dtype
    expert_bytes: int  # the largest expert as stored
    prefetch_bytes: int  # for experts that are read ahead
    hidden_bytes: int  # what is left for hidden states
    macro_batch: int  # tokens per read of the weights
    chunk_tokens: int  # tokens through a decoder layer at once


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device that computes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def plan_memory(skeleton: Skeleton, layers: Sequence[Layer], budget: int) -> MemoryPlan:
    """Split a budget of bytes; see MemoryPlan."""
    itemsize = skeleton.dtype.itemsize
    total = sum(t.numel() * itemsize for t in saved_tensors(skeleton.model).values())
    layer_bytes = max(
        sum(skeleton.shapes[layer.prefix + n].numel() for n in layer.names) * itemsize for layer in layers
    )
    expert_bytes = max((layer.experts.nbytes(0) for layer in layers if layer.experts is not None), default=0)
    split = split_budget(budget, total, layer_bytes, expert_bytes, skeleton.hidden_size * itemsize * HIDDEN_COPIES)
    return MemoryPlan(
        total_bytes=total,
        resident=split.resident,
        drop_pages=skeleton.checkpoint.nbytes > psutil.virtual_memory().total // 2,
        layer_bytes=layer_bytes,
        expert_bytes=expert_bytes,
        prefetch_bytes=split.prefetch_bytes,
        hidden_bytes=split.hidden_bytes,
        macro_batch=split.macro_batch,
        chunk_tokens=_CHUNK_TOKENS,
    )
