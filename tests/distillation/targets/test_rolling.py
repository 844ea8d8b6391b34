"""The teacher answers a window of text, the student trains on it, the window is dropped: the same weights as one big store."""

import contextlib
import dataclasses
import shutil

import pytest
import torch

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.distillation.targets.formats import StoreOptions
from moe2dense.distillation.targets.rolling import Order, rolling_targets, store_bytes
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, same, settings, weights

PER_STEP, EPOCHS, SEED = 4, 2.0, 3


def size_of(folder) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def rolled(teacher, blocks, folder, steps, options=None, **order):
    """Targets with just enough disk for windows of `steps` steps."""
    options = options or StoreOptions()
    fixed, each = store_bytes(teacher, options, blocks.input_ids.shape[1])
    settled = Order(**({"blocks": len(blocks), "per_step": PER_STEP, "epochs": EPOCHS, "seed": SEED} | order))
    targets = rolling_targets(teacher, blocks, folder, fixed + each * PER_STEP * steps, settled, options)
    assert targets is not None and targets.steps == steps
    return targets


def big_store(teacher, blocks, folder, **options):
    return open_targets(write_targets(teacher, blocks, folder, **options), blocks)


@pytest.mark.parametrize("features", ["", pytest.param("mse:learned", marks=pytest.mark.slow)])
def test_fifty_windows_give_the_weights_of_one_store_on_bounded_disk(tmp_path, features):
    teacher, blocks = make_teacher(torch.float64), make_blocks(100)
    config = settings(epochs=EPOCHS, features=features)
    layers = ("hidden-0", "hidden-1") if features else ()
    straight = make_student()
    distill(
        straight,
        data=blocks,
        targets=big_store(teacher, blocks, tmp_path / "store", features=layers),
        config=config,
        seed=SEED,
    )
    targets = rolled(teacher, blocks, tmp_path / "rolling", 1, StoreOptions(features=layers))
    fixed, each = store_bytes(teacher, targets.options, 12)
    windows, sizes, begin = set(), [], targets.begin_step

    def watched(step):
        begin(step)
        windows.update(p.name for p in (tmp_path / "rolling").iterdir())
        sizes.append(size_of(tmp_path / "rolling"))

    targets.begin_step = watched
    student = make_student()
    distill(student, data=blocks, targets=targets, config=config, seed=SEED)
    assert len(windows) == 50 and max(sizes) <= fixed + each * PER_STEP and max(sizes) < size_of(tmp_path / "store") / 2
    assert same(weights(student), weights(straight))
    targets.finish()
    assert not (tmp_path / "rolling").exists()


@pytest.mark.parametrize("stop_at", [2, 6, 7])
@pytest.mark.parametrize("kept", [True, False])
def test_it_goes_on_in_any_window(tmp_path, stop_at, kept):
    """Windows of 3 steps, checkpoints every 3: stopped within a window, at its end, and after it was dropped."""
    teacher, blocks, config = make_teacher(torch.float64), make_blocks(40), settings(epochs=EPOCHS)
    straight = make_student()
    distill(straight, data=blocks, targets=big_store(teacher, blocks, tmp_path / "store"), config=config, seed=SEED)

    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == stop_at:
            raise InterruptedError

    folder = tmp_path / "rolling"
    first = rolled(teacher, blocks, folder, 3)
    with contextlib.suppress(InterruptedError):
        distill(
            make_student(), data=blocks, targets=first, config=config, seed=SEED, out=tmp_path / "run", progress=stop
        )
    assert Checkpoints(tmp_path / "run/checkpoints").steps()[-1] == stop_at // 3 * 3
    if not kept:
        shutil.rmtree(folder)
    student = make_student()
    distill(
        student,
        data=blocks,
        targets=rolled(teacher, blocks, folder, 3),
        config=config,
        seed=SEED,
        out=tmp_path / "run",
        resume=True,
    )
    assert same(weights(student), weights(straight))


def test_a_teacher_in_memory_answers_without_disk(tmp_path):
    teacher, blocks, config = make_teacher(), make_blocks(40), settings(epochs=1.0)
    straight, student = make_student(), make_student()
    distill(straight, teacher, blocks, config=config, seed=SEED)
    order = Order(40, PER_STEP, 1.0, SEED)
    targets = rolling_targets(teacher, blocks, tmp_path / "none", 0, order, StoreOptions())
    assert targets is not None
    distill(student, data=blocks, targets=targets, config=config, seed=SEED)
    assert not (tmp_path / "none").exists()
    for name, value in weights(student).items():
        torch.testing.assert_close(value, weights(straight)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_fits_is_one_store(tmp_path):
    order = Order(24, PER_STEP, 1.0, SEED)
    assert rolling_targets(make_teacher(), make_blocks(), tmp_path, 10**9, order, StoreOptions()) is None


def test_sizes_that_hold_nothing_are_refused(tmp_path):
    teacher, order = make_teacher(), Order(24, PER_STEP, 1.0, SEED)
    with pytest.raises(UserError, match=r"--targets-disk .* holds less than one step's targets"):
        rolling_targets(teacher, make_blocks(), tmp_path, 70_000, order, StoreOptions())
    with pytest.raises(UserError, match="stores nothing"):
        rolling_targets(teacher, make_blocks(), tmp_path, 0, order, StoreOptions("sampled"))
    targets = rolling_targets(teacher, make_blocks(), tmp_path, 0, order, StoreOptions())
    with pytest.raises(UserError, match="temperature auto needs the targets of all blocks at once"):
        config = dataclasses.replace(settings(), temperature_schedule="auto")
        distill(make_student(), data=make_blocks(), targets=targets, valid=make_blocks(5, seed=9), config=config,
                valid_targets=rolling_targets(teacher, make_blocks(5, seed=9), tmp_path, 0, order, StoreOptions()))  # fmt: skip


def test_a_window_has_the_blocks_of_its_steps():
    order = Order(30, PER_STEP, 1.5, SEED)
    assert order.steps == 11
    expected = {b for s in (3, 4) for b in step_blocks(30, PER_STEP, s, SEED)}
    assert order.of(range(3, 5)) == sorted(expected)


def test_every_mask_is_in_the_window(tmp_path):
    """Packed documents: the teacher sees in a window what it sees in the whole text."""
    ids = make_blocks(20).input_ids
    documents = torch.arange(12).repeat(20, 1) // 5
    blocks = Blocks(ids, document_ids=documents.int())
    teacher = make_teacher(torch.float64)
    targets = rolled(teacher, blocks, tmp_path / "rolling", 2, epochs=1.0)
    store = big_store(teacher, blocks, tmp_path / "store")
    for step in range(5):
        targets.begin_step(step)
        rows = step_blocks(20, PER_STEP, step, SEED)
        assert torch.equal(targets.batch(rows).hidden, store.batch(rows).hidden)
