"""What training asks of targets, and what some targets and some rows of them can give beyond that."""

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moe2dense.losses.teacher_rows import TeacherRows
from moe2dense.modeling.head import OutputHead

# N blocks, S block length, n = N S tokens, t tokens of a tile, H teacher hidden, V vocabulary


@runtime_checkable
class Targets(Protocol):
    """The teacher's answers on N blocks."""

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """Return the teacher at every position of some blocks, in their order."""
        ...


@runtime_checkable
class FeatureTargets(Targets, Protocol):
    """Targets of a teacher whose size is known, with features of some of its layers (modeling/hooks.py)."""

    @property
    def features(self) -> Collection[str]:
        """The names of the features that are held."""
        ...

    @property
    def layers(self) -> int:
        """How many layers the teacher has; 0 where that is not known."""
        ...

    @property
    def width(self) -> int:
        """The teacher's hidden size."""
        ...


@runtime_checkable
class SteppedTargets(Targets, Protocol):
    """Targets that must know which step asks."""

    def begin_step(self, step: int) -> None:
        """Prepare for step `step` (from 0); every process calls it."""
        ...


@runtime_checkable
class RoutedTargets(Targets, Protocol):
    """Targets of a teacher whose routing was recorded."""

    def token_weights(self, name: str) -> Tensor:
        """Return [N, S]: how the teacher routed each token. Raises UserError where it was not recorded."""
        ...


@runtime_checkable
class HiddenStates(Protocol):
    """Anything that holds a teacher's final hidden states [N, S, H] and the head that turns them into logits."""

    hidden: Tensor
    head: OutputHead


@runtime_checkable
class FeatureRows(Protocol):
    """Rows that may hold features of the teacher's layers, [n, ...] by name."""

    @property
    def features(self) -> dict[str, Tensor] | None:
        """The features; None where there are none."""
        ...


@runtime_checkable
class WholeRows(TeacherRows, Protocol):
    """Rows that know the teacher's logits of every token."""

    def select(self, index: Tensor) -> "WholeRows":
        """Return the rows of some tokens, index [m]."""
        ...

    def to(self, device: torch.device) -> "WholeRows":
        """Return the rows on another device."""
        ...

    def logits_of(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return the teacher's logits [t, V] at the tokens `rows`."""
        ...


def row_features(rows: TeacherRows | None) -> dict[str, Tensor]:
    """Return the features that some rows hold, by name; {} for none."""
    return (rows.features or {}) if isinstance(rows, FeatureRows) else {}
