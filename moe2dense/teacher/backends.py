"""Run a layer's experts over a macro-batch, in the way that fits and is installed.

streamed: one expert at a time, read from disk or kept in memory; runs everywhere and shows observers every expert.
grouped_mm: transformers' grouped matrix products over all experts of a layer at once; the teacher must fit in memory.
megablocks: its dropless grouped MLP; optional, CUDA only, and the teacher must fit in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import gated_ffn
from moe2dense.common.units import show_bytes
from moe2dense.errors import UserError
from moe2dense.modeling.gated_ffn import has_plain_gating
from moe2dense.teacher import megablocks
from moe2dense.teacher.cost import resident_share
from moe2dense.teacher.experts import route
from moe2dense.teacher.layer_pass import LayerPass
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.memory import MemoryPlan
from moe2dense.teacher.run_experts import OnExpert, run_streamed
from moe2dense.teacher.sampled_routing import Resample
from moe2dense.teacher.skeleton import Skeleton

BACKENDS = ("auto", "streamed", "grouped_mm", "megablocks")
MEGABLOCKS_HELP = "megablocks is not installed; on a CUDA machine, pip install 'moe2dense[megablocks]' (it brings the torch it is pinned to)"
_GROUP_TOKENS = 8192  # tokens in one grouped product; each is copied K times


def megablocks_available() -> str:
    """Return '' when the megablocks backend can be used, else one line that says how to get it."""
    return "" if find_spec("megablocks") and find_spec("grouped_gemm") else MEGABLOCKS_HELP


def _plain_gating(layers: Sequence[Layer]) -> bool:
    """Return whether every expert is silu(gate) * up without biases, the only kind megablocks is given."""
    return all(has_plain_gating(layer.routed) for layer in layers if layer.sparse)


def _refusal(experts: str, skeleton: Skeleton, layers: Sequence[Layer], plan: MemoryPlan, budget: int) -> str:
    """Return why a resident backend cannot run this teacher, or ''."""
    card = skeleton.card
    if card is None:
        return "the teacher has no experts"
    if card.dispatch == "stacked":
        return f"{card.title} scales its experts' inputs"
    if not plan.resident:
        return (
            f"the teacher needs {show_bytes(plan.total_bytes)} in memory and {resident_share(bool(plan.ram_bytes))} of "
            f"{show_bytes(budget)} may hold weights; raise {'gpu_memory' if plan.ram_bytes else 'memory'}"
        )
    if experts == "megablocks":
        if skeleton.device.type != "cuda":
            return megablocks_available() or "it needs a CUDA device"
        return megablocks_available() or (
            "" if _plain_gating(layers) else f"{card.title}'s experts are not silu(gate) * up"
        )
    sizes = skeleton.hidden_size, int(getattr(skeleton.model.config, card.expert_width))
    if any(n * skeleton.dtype.itemsize % 16 for n in sizes):
        return f"rows must be multiples of 16 bytes, and the teacher's sizes are {sizes[0]} and {sizes[1]}"
    return ""


def choose_backend(experts: str, skeleton: Skeleton, layers: Sequence[Layer], plan: MemoryPlan, budget: int) -> str:
    """Return the backend that `experts` means for this teacher. Raises UserError for one that is unknown or cannot run it."""
    if experts not in BACKENDS:
        raise UserError(f"experts must be one of {', '.join(BACKENDS)}; found {experts!r}")
    if experts == "auto":
        fits = skeleton.device.type == "cuda" and not _refusal("grouped_mm", skeleton, layers, plan, budget)
        return "grouped_mm" if fits else "streamed"
    if experts != "streamed" and (why := _refusal(experts, skeleton, layers, plan, budget)):
        raise UserError(f"experts={experts!r} cannot run this teacher: {why}; or use experts='streamed'")
    return experts


@dataclass(frozen=True)
class ExpertRuntime:
    """How the experts of a stream are computed."""

    backend: str
    prefetch_bytes: int  # for the experts that are read ahead
    resample: Resample | None = None  # draws a token's experts anew


def run_experts(runtime: ExpertRuntime, layer: Layer, layer_pass: LayerPass, on_expert: OnExpert | None) -> None:
    """Add sum_e w_te f_e(x_t) of the real tokens to `layer_pass.y` [T, H]."""
    assert layer_pass.top_k_index is not None and layer_pass.top_k_weights is not None
    assert layer.experts is not None and layer.card is not None
    if runtime.backend != "streamed" and on_expert is None:
        return _run_grouped(runtime.backend, layer, layer_pass, layer_pass.top_k_index, layer_pass.top_k_weights)
    if runtime.backend == "grouped_mm":  # observers see one expert at a time, of those in memory
        layer.load_experts()
    routing = route(layer_pass.top_k_index, layer_pass.token_mask, len(layer.experts))
    return run_streamed(
        layer.experts, layer_pass.x, routing, layer_pass.top_k_weights, layer_pass.y,
        input_scaled=layer.card.input_scaled, on_expert=on_expert, budget=runtime.prefetch_bytes,
    )  # fmt: skip


def _run_grouped(backend: str, layer: Layer, layer_pass: LayerPass, index: Tensor, weights: Tensor) -> None:
    """Run all experts of a layer at once; they are read at the first call and stay in memory."""
    if layer.dropless is None:
        layer.load_experts()
        if backend == "megablocks":
            assert layer.experts is not None
            layer.dropless = megablocks.build(layer.experts, index.shape[1], layer.skeleton.device)
            layer.unload_experts()
    real = layer_pass.token_mask.nonzero()[:, 0]
    assert layer.experts is not None
    passed = len(real) * index.shape[1]
    count_flops(gated_ffn(passed, layer.experts.width, layer_pass.x.shape[1]), layer.skeleton.device.type)
    for rows in real.split(_GROUP_TOKENS):
        x = layer_pass.x[rows].to(layer.skeleton.device)
        args = index[rows].to(x.device), weights[rows].to(x.device, x.dtype)
        y = layer.grouped(x, *args) if layer.dropless is None else megablocks.run(layer.dropless, x, *args)
        layer_pass.y[rows] += y.to(layer_pass.y.device)
