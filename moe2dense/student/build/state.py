"""Hold the state of a build: the student so far, its hidden states, and what is asked of each layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe2dense.config.schema import BuildConfig
from moe2dense.student.build.assemble import CopiedTensors
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.build.layer_store import LayerStore
from moe2dense.student.ffn.refit import FIRST_RIDGE, RIDGES
from moe2dense.student.prune.cut import Cut
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import LayerProvenance
from moe2dense.teacher.model import Teacher
from moe2dense.teacher.routing import RoutingStats

# N blocks, S block length, T = N * S tokens, H hidden
Progress = Callable[..., None]


@dataclass
class BuildState:
    """What building a layer needs: the teacher, the student so far, its hidden states, the settings.

    Blocks and tokens are this process's share; held-out ones may all be other processes'.
    """

    teacher: Teacher
    runner: LayerRunner
    target: Target
    # base method and steps of `--init`
    base: str
    steps: list[str]
    config: BuildConfig
    seed: int
    # [N] bool: blocks that no fit sees, which choose its best step
    held_out: Tensor
    # [T] bool: tokens that are no padding
    real_tokens: Tensor
    stats: RoutingStats
    # [N, S, H] the student's hidden states before the next layer
    hidden: Tensor
    # bytes for building a layer: the same on every process, since all must choose from as many neurons
    build_bytes: int
    # learning rates of the fits, by name, that later layers begin with
    rates: dict[str, float] = field(default_factory=dict)
    # the ridge that the layer before was refitted with
    ridge: float = FIRST_RIDGE
    provenance: list[LayerProvenance | None] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def begin_where(self, record: dict[str, Any]) -> None:
        """Let the next layer's fits begin with the rates and the ridge that a layer's record ended with."""
        self.rates |= {name: record[f"{name}_rate"] for name in ("local", "layer") if f"{name}_rate" in record}
        if record.get("ridge") in RIDGES:
            self.ridge = record["ridge"]


@dataclass
class StudentBuild(BuildState):
    """The state of a build of a whole student, beyond its layers' FFNs."""

    copied: CopiedTensors = field(kw_only=True)
    # channels, layers and heads that a pruned student keeps
    cut: Cut | None = None
    # the folder of finished layers
    store: LayerStore | None = None
    # [N, S, H] the teacher's final hidden states, where the student is healed
    teacher_final: Tensor | None = None
    # [N, S, H] bf16: the teacher's hidden states by layer of the student, which the heal follows
    hints: dict[str, Tensor] = field(default_factory=dict)
