"""What of a teacher stays in memory, and how many tokens go through it at once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from moe2dense.teacher.adapter import saved_tensors

if TYPE_CHECKING:
    from moe2dense.teacher.load import Teacher

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


def plan_memory(teacher: "Teacher") -> MemoryPlan:
    """Split the teacher's budget; see MemoryPlan."""
    shapes = teacher.shapes
    compute = teacher.dtype.itemsize
    total = sum(t.numel() * compute for t in saved_tensors(teacher.model).values())
    layers = [teacher.layer(i) for i in range(len(teacher.body.layers))]
    layer_bytes = max(sum(shapes[layer.prefix + n].numel() for n in layer.names) * compute for layer in layers)
    sparse = [layer for layer in layers if layer.experts is not None]
    expert_bytes = max((layer.experts.nbytes(0) for layer in sparse if layer.experts), default=0)
    resident = total <= teacher.budget // 2
    weights = total if resident else layer_bytes + 2 * expert_bytes
    left = max(teacher.budget - weights - WORK_BYTES, teacher.budget // 8)
    prefetch = 2 * expert_bytes + (0 if resident else min(left // 4, 2 * expert_bytes))
    left -= max(0, prefetch - 2 * expert_bytes)
    per_token = teacher.hidden_size * compute * _BUFFERS
    return MemoryPlan(
        total_bytes=total,
        resident=resident,
        drop_pages=teacher.checkpoint.nbytes > psutil.virtual_memory().total // 2,
        layer_bytes=layer_bytes,
        expert_bytes=expert_bytes,
        prefetch_bytes=prefetch,
        hidden_bytes=left,
        macro_batch=max(LEAST_MACRO_BATCH, left // per_token),
        chunk_tokens=_CHUNK_TOKENS,
    )
