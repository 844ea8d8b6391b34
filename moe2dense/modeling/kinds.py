"""Tell kinds of models apart: a built student, a model with adapters, an ordinary causal language model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedModel

from moe2dense.errors import UserError
from moe2dense.families.cards import StudentCard


@runtime_checkable
class BuiltStudent(Protocol):
    """A finished student (`moe2dense.student.types.Student`): an ordinary model and a record of what it was built from."""

    model: PreTrainedModel
    card: StudentCard
    teacher_path: str
    method: str

    @property
    def provenance(self) -> Sequence[object]:
        """Where the neurons of each layer come from."""
        ...


@runtime_checkable
class AdaptedModel(Protocol):
    """A model inside peft's wrapper, which trains small adapters and leaves the weights alone."""

    def get_base_model(self) -> nn.Module:
        """Return the model inside the wrapper."""
        ...


def language_model(student: BuiltStudent | PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model of a built student; a model is returned as it is.

    Raises UserError for anything else.
    """
    model = student.model if isinstance(student, BuiltStudent) else student
    if not isinstance(model, nn.Module):
        raise UserError(
            f"student: a Student or a causal language model of transformers is needed; found {type(student).__name__}"
        )
    return model


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside peft's wrapper; a model without one is returned as it is."""
    return model.get_base_model() if isinstance(model, AdaptedModel) else model  # type: ignore[return-value]
