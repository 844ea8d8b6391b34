"""The state of a build: the student so far, its hidden states, and what is asked of each layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe2dense.config.schema import BuildConfig
from moe2dense.student.build.assemble import CarriedOver
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.layer_store import LayerStore
from moe2dense.student.prune.cut import Cut
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.routing import RoutingStats

# N blocks, S block length, T = N * S tokens, H hidden, E experts, M student FFN width
Progress = Callable[..., None]


@dataclass
class BuildState:
    """The state of a build: the student so far, its hidden states, and what is asked of each layer."""

    teacher: Teacher
    runner: LayerRunner
    target: Target
    base: str
    steps: list[str]
    config: BuildConfig
    seed: int
    held: Tensor  # [N] bool: blocks kept back from every fit, to choose the step
    real: Tensor  # [T] bool
    stats: RoutingStats
    hidden: Tensor  # [N, S, H] the student's
    provenance: list[LayerProvenance | None] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Building(BuildState):
    """A build that makes a whole student."""

    carried: CarriedOver = field(kw_only=True)
    cut: Cut | None = None  # channels, layers and heads that a pruned student keeps
    store: LayerStore | None = None  # where finished layers go
    final: Tensor | None = None  # [N, S, H] the teacher's final hidden states
    hints: dict[str, Tensor] = field(default_factory=dict)  # [N, S, H] bf16: the teacher's states by a student's layer
