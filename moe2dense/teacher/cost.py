"""What running a teacher costs, from its config alone: bytes on disk and in memory, tokens that share one reading."""

from moe2dense.common.units import parse_bytes
from moe2dense.families.resolve import ResolvedTeacher
from moe2dense.modeling.shape import Geometry

HIDDEN_COPIES = 5  # residual stream in and out, attention output, block input and output, while a layer runs


def checkpoint_bytes(teacher: ResolvedTeacher, shape: Geometry) -> int:
    """Size of the teacher's weight files; two bytes a parameter where they are not on this machine."""
    files = list(teacher.path.glob("*.safetensors")) if teacher.path else []
    return sum(f.stat().st_size for f in files) or 2 * shape.parameters


def memory_budget(text: str) -> int:
    """`--memory` in bytes; `auto` is half of what is free now."""
    if text == "auto":
        import psutil

        return psutil.virtual_memory().available // 2
    return parse_bytes(text, "--memory")


def resident_layer_bytes(shape: Geometry) -> int:
    """fp32 bytes of one layer's attention, norms and router plus two experts (one computing, one prefetched)."""
    outside = shape.parameters - len(shape.moe_layers) * shape.num_experts * shape.expert_parameters
    embeddings = 2 * shape.vocab_size * shape.hidden_size
    per_layer = max(outside - embeddings, 0) // shape.num_hidden_layers
    return 4 * (per_layer + 2 * shape.expert_parameters)


def macro_batch_tokens(budget: int, shape: Geometry) -> int:
    """Tokens that share one read of the weights: those whose hidden states fit beside one layer, more by spilling to disk."""
    from moe2dense.teacher.memory import LEAST_MACRO_BATCH

    room = budget - resident_layer_bytes(shape)
    return max(LEAST_MACRO_BATCH, room // (4 * HIDDEN_COPIES * shape.hidden_size))
