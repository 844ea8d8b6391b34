"""What running a teacher costs: how a memory budget is split, bytes on disk and in memory, tokens that share one reading.

All of it follows from sizes alone, so plans need neither weights nor torch.
"""

import os
from dataclasses import dataclass

import psutil

from moe2dense.common.flops import product
from moe2dense.common.units import parse_memory
from moe2dense.families.resolve import ResolvedTeacher
from moe2dense.modeling.shape import Geometry

HIDDEN_COPIES = 5  # residual stream in and out, attention output, block input and output, while a layer runs
WORK_BYTES = 96_000_000  # slices of converted weights, activations of a chunk
LEAST_MACRO_BATCH = 4096  # below this, hidden states spill rather than the weights being read more often
EXPERT_CACHE = 4  # a fourth of the memory may keep a layer's experts while its student is built
_GPU_SHARE = 0.9  # of a GPU's free memory: its libraries need some, and torch's blocks leave gaps
_RESIDENT_SHARE = 0.85  # of that, which weights may take for good
_COMPUTE_BYTES = 4  # of a number in float32, in which a CPU computes


def memory_budget(memory: str | int | float, what: str = "memory", free: int | None = None) -> int:
    """Return the bytes for weights and hidden states of this process. `auto` is half of what is free (`free`, else measured).

    Processes that were started together on one machine divide what is free among them.
    `what` is the name of the argument in errors. Raises UserError for no size, or one that holds no layer.
    """
    if memory == "auto":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun and accelerate set it
        return (psutil.virtual_memory().available if free is None else free) // 2 // processes
    return parse_memory(memory, what)


def gpu_budget(memory: str | int | float, free: int, what: str = "gpu_memory") -> int:
    """Return the bytes of a GPU's memory that may be used; `auto` is what is `free` but a tenth. Raises UserError for no size."""
    return int(_GPU_SHARE * free) if memory == "auto" else parse_memory(memory, what)


@dataclass(frozen=True)
class BudgetSplit:
    """What a budget of bytes is spent on."""

    resident: bool  # the whole model stays in memory
    prefetch_bytes: int  # experts that are read ahead
    hidden_bytes: int  # for hidden states, where the budget is
    macro_batch: int  # tokens per read of the weights
    build_bytes: int  # for building a student's layer: neurons to choose from, Gram matrices, fits


def split_budget(budget: int, total: int, layer: int, expert: int, token: int, ram: int = 0) -> BudgetSplit:
    """Split a budget between weights, experts read ahead and hidden states; all in bytes.

    total: the whole model; layer: its largest layer without routed experts; expert: its largest expert as stored; token: all
    copies of one token's hidden state. The budget is a GPU's where there is `ram` beside it: the model stays there where it
    leaves some room, and hidden states that find none rest in `ram`.
    """
    if ram:
        return _split_gpu(budget, total, layer, expert, token, ram)
    resident = total <= budget // 2
    weights = total if resident else layer + 2 * expert
    left = max(budget - weights - WORK_BYTES, budget // 8)
    prefetch = 2 * expert + (0 if resident else min(left // 4, 2 * expert))
    left -= max(0, prefetch - 2 * expert)
    return BudgetSplit(resident, prefetch, left, max(LEAST_MACRO_BATCH, left // token), budget // 2)


def resident_share(on_gpu: bool) -> str:
    """Say how much of a budget weights may take for good."""
    return f"{_RESIDENT_SHARE:.0%}" if on_gpu else "at most half"


def _split_gpu(budget: int, total: int, layer: int, expert: int, token: int, ram: int) -> BudgetSplit:
    """Split a GPU's memory. What weights leave is for hidden states and the building of a layer, half and half."""
    resident = total <= _RESIDENT_SHARE * budget
    weights = total if resident else layer + 3 * expert  # one computing, one on its way, one's worth of products
    left = max(budget - weights - WORK_BYTES, budget // 16)
    held = left // 2 + ram // 2
    return BudgetSplit(resident, 4 * expert, left // 2, max(LEAST_MACRO_BATCH, held // token), left // 2)


def pass_flops(shape: Geometry, blocks: int, length: int) -> float:
    """Return the FLOPs of a teacher's pass over [blocks, length] tokens, without its head."""
    experts = len(shape.moe_layers) * shape.top_k * shape.expert_parameters
    return product(blocks * length, 1, shape.dense_weights + experts) + float(shape.pair_flops) * blocks * length**2


def checkpoint_bytes(teacher: ResolvedTeacher, shape: Geometry) -> int:
    """Return the size of the teacher's weight files; two bytes a parameter where they are not on this machine."""
    files = list(teacher.path.glob("*.safetensors")) or list(teacher.path.glob("*.gguf")) if teacher.path else []
    return sum(f.stat().st_size for f in files) or 2 * shape.parameters


def _layer_bytes(shape: Geometry) -> int:
    """Return the bytes of one layer's attention, norms and router, on average, in the compute dtype."""
    outside = shape.parameters - len(shape.moe_layers) * shape.num_experts * shape.expert_parameters
    embeddings = 2 * shape.vocab_size * shape.hidden_size
    return _COMPUTE_BYTES * (max(outside - embeddings, 0) // shape.num_hidden_layers)


def resident_layer_bytes(shape: Geometry) -> int:
    """Return the bytes of one layer outside its experts, plus two experts (one computing, one read ahead)."""
    return _layer_bytes(shape) + 2 * _COMPUTE_BYTES * shape.expert_parameters


def split_for(shape: Geometry, budget: int, ram: int = 0) -> BudgetSplit:
    """Return how a budget is split for a teacher of this shape: a GPU's where there is `ram` beside it, in half precision."""
    itemsize = _COMPUTE_BYTES // 2 if ram else _COMPUTE_BYTES
    total, expert = itemsize * shape.parameters, itemsize * shape.expert_parameters
    layer = _layer_bytes(shape) * itemsize // _COMPUTE_BYTES
    return split_budget(budget, total, layer, expert, itemsize * HIDDEN_COPIES * shape.hidden_size, ram)


def recording_batch(macro_batch: int, states: int) -> int:
    """Return how many of a reading's tokens fit in the same memory where so many layers' states are kept beside them, one of them twice."""
    return macro_batch * HIDDEN_COPIES // (HIDDEN_COPIES + states + bool(states))


def resident_bytes(shape: Geometry, itemsize: int = _COMPUTE_BYTES) -> int:
    """Return the bytes of the whole model in a compute dtype of so many bytes."""
    return itemsize * shape.parameters


def macro_batch_tokens(budget: int, shape: Geometry) -> int:
    """Return how many tokens share one read of the weights: those whose hidden states fit beside what is in memory."""
    return split_for(shape, budget).macro_batch
