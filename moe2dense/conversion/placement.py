"""Where a run's weights and hidden states rest, where its stages compute, and in what precision: decided once, from sizes."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from moe2dense.common.units import show_bytes
from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.modeling.shape import Geometry
from moe2dense.student.footprint import FP32, STATE_COPIES
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.cost import HIDDEN_COPIES, BudgetSplit, gpu_budget, memory_budget, split_for

GPU, RAM, DISK = "the GPU", "memory", "disk"
# what is computed -> precision on a GPU; on a CPU all is float32
PRECISIONS = {
    "teacher": "bfloat16",
    "fits of the build": "float32 with TF32 products",
    "Gram matrices and solutions": "float32 and float64",
    "training": "bfloat16 over float32 weights",
    "scores": "float32",
}


@dataclass(frozen=True)
class Placement:
    """device computes every stage. weights, states and student_states: where the teacher's weights, its hidden states of the
    build's tokens and the student's rest: the GPU, memory or disk.
    """

    device: str
    memory: int
    gpu_memory: int
    weights: str
    states: str
    student_states: str
    precisions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def sentence(self) -> str:
        """Say it in words."""
        room = show_bytes(self.memory) + " of memory"
        if self.gpu_memory:
            room = f"{show_bytes(self.gpu_memory)} of the GPU's memory and {room}"
        exact = "; ".join(f"{what} in {precision}" for what, precision in self.precisions.items())
        return (
            f"placement: every stage computes on {self.device}, within {room}; the teacher's weights rest on {self.weights}, its hidden "
            f"states of the build's tokens in {self.states}, the student's in {self.student_states}; {exact}"
        )


def plan_placement(
    config: RunConfig, shape: Geometry, target: Target, build: int, device: str, free_gpu: int, free: int | None = None
) -> Placement:
    """Return the placement of a run whose build reads so many tokens.

    device: `cpu` or `cuda`; free_gpu: bytes that are free on the GPU, 0 without one; free: of this machine's memory, measured
    where None is given.
    """
    ram = memory_budget(config.teacher.memory, "--memory", free)
    gpu = gpu_budget(config.teacher.gpu_memory, free_gpu, "--gpu-memory") if device != "cpu" else 0
    split = split_for(shape, gpu or ram, ram if gpu else 0)
    itemsize = 2 if gpu else FP32
    states = itemsize * HIDDEN_COPIES * shape.hidden_size * build
    own = FP32 * STATE_COPIES * target.config.hidden_size * build
    return Placement(
        device=device,
        memory=ram,
        gpu_memory=gpu,
        weights=(GPU if gpu else RAM) if split.resident else DISK,
        states=_rest(states, split, ram, bool(gpu)),
        student_states=GPU if gpu and own <= split.hidden_bytes // 2 else RAM,
        precisions=PRECISIONS if gpu else {"everything": "float32, solutions in float64"},
    )


def with_savings(placement: Placement, heal: TrainConfig | None, train: TrainConfig) -> Placement:
    """Return a placement that says where the heal and training rest their weights in bfloat16 to save memory."""
    rounded, halved = "bfloat16, steps rounded at random", {}
    if heal is not None and heal.weights == "bfloat16":
        halved["the heal"] = rounded
    if train.tokens and train.weights == "bfloat16":
        halved["training"] = rounded
    return replace(placement, precisions=placement.precisions | halved)


def _rest(states: int, split: BudgetSplit, ram: int, on_gpu: bool) -> str:
    """Return where hidden states of so many bytes rest."""
    if states <= split.hidden_bytes:
        return GPU if on_gpu else RAM
    if on_gpu and states <= split.hidden_bytes + ram // 2:
        return f"{GPU} and {RAM}"
    return f"{RAM} and {DISK}"
