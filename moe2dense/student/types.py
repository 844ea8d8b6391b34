"""Hold a finished student, and where the neurons of its layers come from."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe2dense.families.cards import StudentCard

# T tokens, E experts, M student FFN width

# LayerProvenance.source_expert of neurons of a shared expert, of new neurons, and of mixtures of several
SHARED, NEW, MIXED = -1, -2, -3


@dataclass
class LayerProvenance:
    """Where the neurons of a student's layer come from, and how much energy of each expert they keep.

    The energy of neuron j of expert e is sum_t (w_te h_ej(x_t))^2 * |d_ej|^2. A neuron that is averaged with others counts
    with its share of the average.
    """

    # [M] int: the routed expert, or SHARED, NEW, MIXED
    source_expert: Tensor
    # [M] int: the neuron's index in its expert; -1 for NEW and MIXED
    source_neuron: Tensor
    # [E]
    energy_total: Tensor
    # [E] of the neurons that the student has
    energy_kept: Tensor


@dataclass
class Student:
    """A built student: an ordinary transformers model, and a record of how it was built."""

    model: "PreTrainedModel"
    card: "StudentCard"
    # None for layers that were not built from a layer with experts
    provenance: list[LayerProvenance | None]
    teacher_path: str
    method: str
    build_tokens: int
    # a record for each layer and for the heal: errors before and after each step, seconds
    history: list[dict[str, Any]] = field(default_factory=list)
