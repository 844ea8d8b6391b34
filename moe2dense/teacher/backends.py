"""Ways to run a layer's experts over a macro-batch, chosen by what fits and what is installed."""

from typing import TYPE_CHECKING

from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.teacher.experts import OnExpert, Routing, run_streamed

if TYPE_CHECKING:
    from moe2dense.teacher.layers import Layer
    from moe2dense.teacher.load import Teacher

BACKENDS = ("auto", "streamed", "grouped_mm", "megablocks")
MEGABLOCKS_HELP = (
    "megablocks is not installed: on a CUDA machine, pip install 'moe2dense[megablocks]' (it pins its own torch)"
)


def choose_backend(experts: str, teacher: "Teacher") -> str:
    """The backend that `experts` means for this teacher. Raises UserError for one that is unknown or cannot run here."""
    if experts not in BACKENDS:
        raise UserError(f"experts must be one of {', '.join(BACKENDS)}; found {experts!r}")
    return "streamed"


def run_experts(
    teacher: "Teacher",
    layer: "Layer",
    x: Tensor,
    routing: Routing,
    weights: Tensor,
    out: Tensor,
    on_expert: OnExpert | None,
) -> None:
    """Add sum_e w_te f_e(x_t) to `out` [T, H]."""
    assert layer.experts is not None and layer.card is not None
    run_streamed(
        layer.experts, x, routing, weights, out,
        input_scaled=layer.card.input_scaled, on_expert=on_expert, budget=teacher.plan.prefetch_bytes,
    )  # fmt: skip
