"""The results of `plan` and `convert`. No torch here, so that the commands' help is quick."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe2dense.conversion.placement import Placement
from moe2dense.modeling.shape import Geometry
from moe2dense.student.target.resolve import Target


@dataclass(frozen=True)
class Machine:
    """What a plan's times assume: FLOP/s of fp32 matrix products and bytes/s read from the disk."""

    flops: float
    disk: float
    name: str = "this machine"
    disk_measured: bool = False  # False: assumed, as the teacher is not on this disk


@dataclass(frozen=True)
class Plan:
    """All that `moe2dense plan` prints. Sizes in bytes, counts in parameters and tokens, times in seconds."""

    teacher: str
    source: str
    shape: Geometry
    checkpoint_bytes: int
    target: Target
    tokens: int
    build_tokens: int
    block: int
    data: str
    out: str
    memory_budget: int
    macro_batch: int
    reads: int
    break_even_batch: int
    memory: dict[str, int]
    disk: dict[str, int]
    flops: dict[str, float]
    seconds: dict[str, float]
    machine: Machine
    placement: Placement
    warnings: tuple[str, ...] = field(default=())
    passes: float = 1.0  # of training over its text
    depth: str = "influence"  # which layers stay where some go
    ood: str = ""  # text of another kind for the report
    folder_texts: tuple[str, ...] = ()  # which of path, valid and ood the teacher's folder names

    @property
    def bytes_per_token(self) -> float:
        """Return the checkpoint bytes read for one token position at this macro-batch."""
        return self.checkpoint_bytes / min(self.macro_batch, max(self.tokens, self.build_tokens, 1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        skip = {"target", "shape", "machine", "placement"}
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        target = {k: getattr(self.target, k) for k in ("to", "label", "width", "parameters", "geometry", "checkpoint")}
        student = target | {"host": self.target.card.name, "moe_shaped": self.target.card.moe_shaped}
        extra = {
            "shape": dataclasses.asdict(self.shape),
            "student": student,
            "machine": dataclasses.asdict(self.machine),
            "placement": self.placement.to_dict(),
        }
        return table | extra | {"bytes_per_token": self.bytes_per_token, "warnings": list(self.warnings)}


GAINED_NOTHING = 3  # exit code of a conversion whose training did not bring the student closer to its teacher


@dataclass(frozen=True)
class Result:
    """What a conversion left behind.

    scores: row name -> numbers on the held-out text. exported: which student `model` holds: "last" (of the last training step),
    "best" (of an earlier checkpoint, closer to the teacher), or "built" (as it was before training). gained: whether training
    brought it closer to the teacher; None where nothing was trained.
    """

    out: Path
    model: Path
    report: Path
    scores: dict[str, Any]
    exported: str = "last"
    gained: bool | None = None

    @property
    def exit_code(self) -> int:
        """Return 0, or 3 where training gained nothing and the student is exported as it was built."""
        return GAINED_NOTHING if self.gained is False else 0
