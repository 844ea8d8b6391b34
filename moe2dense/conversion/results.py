"""The results of `plan` and `convert`. No torch here, so that the commands' help is quick."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe2dense.conversion.placement import Placement
from moe2dense.families.machines import Machine
from moe2dense.modeling.shape import Geometry
from moe2dense.student.target.resolve import Target


@dataclass(frozen=True)
class StagePlan:
    """What a stage is planned to take.

    flops: by precision, `half` (bfloat16), `single` or `double`, on all devices; busiest: of the device that has most to do.
    read, written: bytes from and to disk, of one process; bus: bytes between main memory and an accelerator; memory: the most it
    holds beside the program's own, where it computes.
    """

    flops: dict[str, float]
    busiest: dict[str, float] = field(default_factory=dict)
    read: float = 0.0
    bus: float = 0.0
    written: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0

    @property
    def all_flops(self) -> float:
        """Return the FLOPs in every precision."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Plan:
    """All that `moe2dense plan` prints. Sizes in bytes, counts in parameters and tokens, times in seconds.

    stages: by name, as run.json has them. disk: what stays in the run folder, by part. training, healing: how training and the
    build's end-to-end fit are made to fit, in words.
    """

    teacher: str
    source: str
    shape: Geometry
    checkpoint_bytes: int
    target: Target
    tokens: int
    build_tokens: int
    block: int
    held_out: int  # blocks that are scored, of each text
    data: str
    out: str
    memory_budget: int
    macro_batch: int
    reads: int
    break_even_batch: int
    stages: dict[str, StagePlan]
    disk: dict[str, int]
    from_scratch: float  # FLOPs of training such a student from nothing
    machine: Machine
    placement: Placement
    training: str = ""
    healing: str = ""
    memory_settings: dict[str, Any] = field(default_factory=dict)  # of [train], changed so that it fits
    command: str = ""
    warnings: tuple[str, ...] = field(default=())
    passes: float = 1.0  # of training over its text
    extra: float = 0.0  # what the teacher writes on top of the training text, as a share of it
    depth: str = "influence"  # which layers stay where some go
    ood: str = ""  # text of another kind for the report
    folder_texts: tuple[str, ...] = ()  # which of path, valid and ood the teacher's folder names

    @property
    def bytes_per_token(self) -> float:
        """Return the checkpoint bytes read for one token position at this macro-batch."""
        return self.checkpoint_bytes / min(self.macro_batch, max(self.tokens, self.build_tokens, 1))

    @property
    def flops(self) -> float:
        """Return the FLOPs of all stages."""
        return sum(stage.all_flops for stage in self.stages.values())

    @property
    def seconds(self) -> float:
        """Return the time of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        skip = {"target", "shape", "machine", "placement", "stages"}
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        target = {k: getattr(self.target, k) for k in ("to", "label", "width", "parameters", "geometry", "checkpoint")}
        student = target | {"host": self.target.card.name, "moe_shaped": self.target.card.moe_shaped}
        extra = {
            "shape": dataclasses.asdict(self.shape),
            "student": student,
            "machine": dataclasses.asdict(self.machine),
            "placement": self.placement.to_dict(),
            "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
            "flops": self.flops,
            "seconds": self.seconds,
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
