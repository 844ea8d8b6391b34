"""Split a memory budget for a teacher whose checkpoint is there: which weights stay, how many tokens share one reading."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from moe2dense.common.devices import CPU
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
    hidden_bytes: int  # for hidden states, on the device that computes
    ram_bytes: int  # for those that find no room there: a GPU's neighbour, 0 on a CPU
    macro_batch: int  # tokens per read of the weights
    chunk_tokens: int  # tokens through a decoder layer at once
    build_bytes: int  # for building a layer of a student: its neurons, Gram matrices and fits
    device: torch.device  # computes

    def states_device(self, nbytes: int) -> torch.device:
        """Return where a student's hidden states of so many bytes rest while it is built: a GPU with room for them, else RAM."""
        return self.device if self.device.type == "cpu" or nbytes <= self.hidden_bytes // 2 else CPU


def plan_memory(skeleton: Skeleton, layers: Sequence[Layer], budget: int, ram: int = 0) -> MemoryPlan:
    """Split a budget of bytes, a GPU's where there is `ram` beside it; see MemoryPlan."""
    itemsize = skeleton.dtype.itemsize
    total = sum(t.numel() * itemsize for t in saved_tensors(skeleton.model).values())
    layer_bytes = max(
        sum(skeleton.shapes[layer.prefix + n].numel() for n in layer.names) * itemsize for layer in layers
    )
    expert_bytes = max((layer.experts.nbytes(0) for layer in layers if layer.experts is not None), default=0)
    token = skeleton.hidden_size * itemsize * HIDDEN_COPIES
    split = split_budget(budget, total, layer_bytes, expert_bytes, token, ram)
    return MemoryPlan(
        total_bytes=total,
        resident=split.resident,
        drop_pages=skeleton.checkpoint.nbytes > psutil.virtual_memory().total // 2,
        layer_bytes=layer_bytes,
        expert_bytes=expert_bytes,
        prefetch_bytes=split.prefetch_bytes,
        hidden_bytes=split.hidden_bytes,
        ram_bytes=ram // 2,
        macro_batch=split.macro_batch,
        chunk_tokens=_CHUNK_TOKENS,
        build_bytes=split.build_bytes,
        device=skeleton.device,
    )
