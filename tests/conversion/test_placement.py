"""Where a run's weights and states rest: what fits a GPU stays there, what does not rests in memory, then on disk."""

import pytest

from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags
from moe2dense.conversion.placement import DISK, GPU, RAM, Placement, plan_placement
from moe2dense.families.resolve import resolve_teacher
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.target.resolve import resolve_target
from moe2dense.teacher.cost import split_for

FREE_GPU, FREE = 84 * 10**9, 400 * 10**9  # of an H100, and of the machine beside it


def placed(model: str, to: str, device: str = "cuda", build: int = 200_000, **memory: str) -> Placement:
    config = merge_flags(RunConfig(model=model, to=to), {f"teacher.{k}": v for k, v in memory.items()})
    teacher = resolve_teacher(model)
    shape = teacher_geometry(teacher.config, teacher.card)
    target = resolve_target(to, teacher.config, teacher.card)
    return plan_placement(config, shape, target, build, device, FREE_GPU if device == "cuda" else 0, FREE)


def test_a_teacher_that_fits_a_gpu_in_half_precision_stays_there():
    """Qwen3-30B-A3B takes 61 GB of 84; Mixtral 93."""
    assert placed("qwen3-30b-a3b", "4b").weights == GPU
    assert placed("mixtral", "7b").weights == DISK
    assert placed("qwen3-30b-a3b", "4b", gpu_memory="40GB").weights == DISK


def test_states_rest_on_the_gpu_then_in_memory_then_on_disk():
    few, many = placed("mixtral", "7b", build=50_000), placed("mixtral", "7b", build=20_000_000)
    assert (few.states, few.student_states) == (GPU, GPU)
    assert (many.states, many.student_states) == (f"{RAM} and {DISK}", RAM)
    assert placed("mixtral", "7b", build=1_500_000).states == f"{GPU} and {RAM}"


def test_memory_and_gpu_memory_are_two_numbers():
    given = placed("mixtral", "7b", memory="50GB", gpu_memory="20GB")
    assert (given.memory, given.gpu_memory) == (50 * 10**9, 20 * 10**9)
    default = placed("mixtral", "7b")
    assert (default.memory, default.gpu_memory) == (FREE // 2, int(0.9 * FREE_GPU))
    assert "cuda" in default.sentence() and "bfloat16" in default.sentence()


def test_a_cpu_has_one_memory_and_float32():
    here = placed("mixtral", "7b", device="cpu", memory="400GB")
    assert here.gpu_memory == 0 and here.weights == RAM and "float32" in here.sentence()
    assert placed("mixtral", "7b", device="cpu", memory="8GB").weights == DISK


@pytest.mark.parametrize("budget", [10**9, 24 * 10**9, 75 * 10**9])
def test_a_gpus_memory_is_spent_once(budget):
    teacher = resolve_teacher("mixtral")
    split = split_for(teacher_geometry(teacher.config, teacher.card), budget, FREE)
    assert split.hidden_bytes + split.build_bytes <= budget and split.build_bytes > 0
