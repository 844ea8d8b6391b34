"""A build that keeps its layers on disk: the same student, one layer in memory at a time."""

import contextlib
import multiprocessing
from pathlib import Path

import pytest
import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.families.cards import student_host
from moe2dense.modeling.empty import count_parameters, empty_model
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build import api as build
from moe2dense.student.build.api import build_student, build_to_folder
from moe2dense.student.build.heal_memory import least_heal_bytes
from moe2dense.student.footprint import layer_bytes, pool_bytes
from moe2dense.student.memory import _glibc, eager_release, release_freed_memory
from moe2dense.student.store import load_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make

SHORT = BuildConfig(
    local_steps=8, local_batch=16, layer_steps=4, layer_batch=46, heal_epochs=1, heal_batch=46, hold_out=0.3
)


def target_for(teacher, width: int = 0) -> Target:
    card, config = student_host(teacher.card.host), teacher.config.get_text_config()
    shape = teacher_geometry(config, teacher.card)
    width = width or max(shape.expert_width + shape.shared_width, shape.dense_width)
    student = dense_config(config, card, width)
    return Target("test", "test", card, width, student, count_parameters(empty_model(student)), shape)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3", "lfm2_moe"])
@pytest.mark.parametrize("room", [True, False])
def test_the_student_on_disk_is_the_one_in_memory(family, room, tmp_path, monkeypatch):
    model = make(family, tmp_path / "t")
    teacher, ids = load_teacher(tmp_path / "t", experts="streamed"), blocks(model)
    target = target_for(teacher)
    least = least_heal_bytes(SHORT, target, ids.shape[1], on_gpu=False)
    monkeypatch.setattr(teacher, "budget", least - (not room))
    want = build_student(teacher, target, Blocks(ids), config=SHORT, seed=2)
    folder = build_to_folder(
        teacher, target, Blocks(ids), tmp_path / "build" / "student", tmp_path / "build", config=SHORT, seed=2
    )
    got = load_student(folder)
    assert {n for n, _ in got.model.named_parameters()} == {n for n, _ in want.model.named_parameters()}
    for (name, a), b in zip(want.model.named_parameters(), got.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (
        got.method == "layerwise"
        and got.build_tokens == want.build_tokens
        and len(got.provenance) == len(want.provenance)
    )
    keys = {k for record in got.history for k in record}
    assert ("heal_skipped" in keys) is not room and ("heal_kl_after" in keys) is room


def test_no_layer_stays_in_memory(tmp_path, monkeypatch):
    model = make("mixtral", tmp_path / "t")
    teacher, ids = load_teacher(tmp_path / "t", experts="streamed"), blocks(model)
    monkeypatch.setattr(teacher, "budget", 1000)
    models: list = []
    empty = build.empty_student
    monkeypatch.setattr(build, "empty_student", lambda *args: models.append(empty(*args)) or models[-1])
    real: list[set[str]] = []

    def look(*_: object, **__: object) -> None:
        real.append({n.split(".")[1] for n, p in models[0].named_parameters() if not p.is_meta})

    out = tmp_path / "build"
    build_to_folder(teacher, target_for(teacher), Blocks(ids), out / "student", out, config=SHORT, progress=look)
    assert real == [{"norm"}] * 3
    assert all(p.is_meta for p in models[0].model.layers.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_layers_and_the_plan_tells_it(tmp_path, root, monkeypatch):
    """Peaks of anonymous memory, each of a process of its own."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import build_scale  # pyright: ignore[reportMissingImports]

    measured = []
    for layers in (2, 12):
        build_scale.write_teacher(str(tmp_path / str(layers)), layers, 4, 512, 256)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured.append(pool.apply(build_scale.measure_build, (str(tmp_path / str(layers)), 1024, "60MB", 1024)))
    (small, _, low, _), (large, plan, high, _) = measured
    assert large - small > 40e6 and high - low < 0.3 * (large - small), measured
    assert high < 1.2 * plan, measured


def test_layer_bytes_is_the_largest_step():
    """By hand, for a layer of 10 parameters outside an FFN of 3 * 4 * 5: width 5, hidden 4."""
    states = 4 * 4 * 5 * 7  # four activations of seven tokens
    refit = 4 * 10 + 4 * 2 * 60 + max(4 * 25 + states, 20 * 25)
    assert layer_bytes(70, 60, 5, 4, pool=5, tokens=7, limit=9) == refit
    local = 4 * 10 + 4 * 6 * 60 + 4 * 100 * 7 * 5
    assert layer_bytes(70, 60, 5, 4, pool=5, tokens=7, limit=9, local_batch=100) == local > refit
    whole = 4 * 5 * 70 + 4 * 100 * (7 * 5 + 16 * 4)
    assert layer_bytes(70, 60, 5, 4, pool=5, tokens=7, limit=9, local_batch=100, layer_batch=100) == whole > local
    grouped = 4 * 10 + 4 * 2 * 60 + 4 * 3**2 + states
    assert layer_bytes(70, 60, 5, 4, pool=5, tokens=7, limit=3) == grouped < refit
    assert layer_bytes(70, 60, 5, 4, pool=1000, tokens=7, limit=9) == 40 + pool_bytes(1000, 4) + 4 * 4 * 1000 * 7


def _anonymous() -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(row for row in rows if row.startswith("RssAnon")).split()[1])


def _given_back() -> int:
    """Bytes that release_freed_memory() returns of what was freed below a block in use."""
    with contextlib.suppress(ZeroDivisionError), eager_release():  # leaves the heap taking blocks of up to 32 MB
        _ = 1 / 0
    blocks = [torch.ones(500_000) for _ in range(60)]
    last = blocks[-1]
    del blocks
    before = _anonymous()
    release_freed_memory()
    return (before - _anonymous()) * int(last[0])


def _freed_at_once() -> int:
    """Bytes that freeing large blocks returns within the context."""
    with eager_release():
        blocks = [torch.ones(500_000) for _ in range(60)]
        full, last = _anonymous(), blocks[-1]
        del blocks
        return (full - _anonymous()) * int(last[0])


@pytest.mark.skipif(_glibc() is None or not Path("/proc/self/status").exists(), reason="glibc's heap, seen in /proc")
def test_freed_memory_goes_back():
    """A heap whose last block is in use keeps what was freed below it until it is told; large blocks never enter it in the context.
    Each in a process of its own: a hole that is left in the heap is used before anything else."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        assert pool.apply(_given_back) > 60e6
        assert pool.apply(_freed_at_once) > 100e6
