"""What the student is made of: dense FFNs, where their neurons come from, and the finished student."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe2dense.families.cards import StudentCard

# T tokens, E experts, K top_k, H hidden, F expert width, M student FFN width

SHARED, NEW, MIXED = -1, -2, -3  # LayerProvenance.source_expert: shared expert, new neuron, mixture of several


@dataclass
class LayerProvenance:
    """Where a student layer's neurons come from. Energy of neuron j of expert e: sum_t (w_te h_ej(x_t))^2 * |d_ej|^2.

    `energy_kept` counts the neurons that were selected whole; a neuron averaged with others counts with its share of the average.
    """

    source_expert: Tensor  # [M] int: the routed expert, or SHARED, NEW, MIXED
    source_neuron: Tensor  # [M] int: the neuron's index in it; -1 for NEW and MIXED
    energy_total: Tensor  # [E]
    energy_kept: Tensor  # [E]


@dataclass
class Student:
    """A built student: an ordinary transformers model, where it came from and what it cost."""

    model: "PreTrainedModel"
    card: "StudentCard"
    provenance: list[LayerProvenance | None]
    teacher_path: str
    method: str
    build_tokens: int
    history: list[dict] = field(
        default_factory=list
    )  # one record per layer: errors before and after each step, seconds
