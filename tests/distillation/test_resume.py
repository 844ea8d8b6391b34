"""distill() against itself after every kind of interruption: stops, signals, kills, full disks, damaged checkpoints, passing faults."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.checkpoints import Checkpoints, on_cpu
from moe2dense.distillation.targets.memory import ResidentTargets, hidden_targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from tests.distillation.tiny_run import Stop, make_blocks, make_student, make_teacher, same, settings, weights


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_resumed_run_is_bit_exact(straight, teacher, tmp_path, stop_at):
    _, expected, whole = straight

    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == stop_at:
            raise Stop

    options = dict(valid=make_blocks(5, seed=9), config=settings(epochs=2.0), seed=3, out=tmp_path)
    with pytest.raises(Stop):
        distill(make_student(), teacher, make_blocks(), progress=stop, **options)
    student = make_student()
    result = distill(student, teacher, make_blocks(), resume=True, **options)
    assert same(weights(student), expected) and result.best_step == whole.best_step
    keys = ("step", "loss", "valid_kl", "valid_nll", "lr", "grad_norm")
    assert [[r.get(k) for k in keys] for r in result.history] == [[r.get(k) for k in keys] for r in whole.history]
    again = make_student()
    distill(again, teacher, make_blocks(), resume=True, **options)  # finished already
    assert same(weights(again), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_save(straight, teacher, tmp_path, number):
    def interrupt(stage, done, total, **numbers):
        if done == 4:
            os.kill(os.getpid(), number)

    options = dict(valid=make_blocks(5, seed=9), config=settings(epochs=2.0), seed=3, out=tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        distill(make_student(), teacher, make_blocks(), progress=interrupt, **options)
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints/step-000004").is_dir()
    student = make_student()
    distill(student, teacher, make_blocks(), resume=True, **options)
    assert same(weights(student), straight[1])


def test_checkpoints_written_behind_are_those_written_at_once(straight, teacher, tmp_path, monkeypatch):
    """As on a GPU: a thread writes copies while the next steps change the weights; an error of the disk stops the run."""
    monkeypatch.setattr("moe2dense.distillation.trainer.written_behind", lambda device: True)
    own = on_cpu
    monkeypatch.setattr("moe2dense.distillation.trainer.on_cpu", lambda *a: {k: v.clone() for k, v in own(*a).items()})
    monkeypatch.setattr(
        "moe2dense.distillation.checkpoints.on_cpu", lambda *a: {k: v.clone() for k, v in own(*a).items()}
    )
    save = Checkpoints.save

    def slow(self, *arguments):
        time.sleep(0.05)
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", slow)
    folder, expected, _ = straight
    student = make_student()
    options = dict(valid=make_blocks(5, seed=9), config=settings(epochs=2.0), seed=3)
    distill(student, teacher, make_blocks(), out=tmp_path / "behind", **options)
    assert same(weights(student), expected)
    ours, theirs = Checkpoints(tmp_path / "behind/checkpoints"), Checkpoints(folder / "checkpoints")
    assert ours.steps() == theirs.steps()
    for step in ours.steps():
        for mine, other in zip(ours.load(step)[:2], theirs.load(step)[:2], strict=True):
            assert same(mine, other)

    def full(self, *arguments):
        raise UserError("the disk is full")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        distill(make_student(), teacher, make_blocks(), out=tmp_path / "full", **options)


def train_to_the_end(out, final, started):
    def linger(*_, **__):
        started.set()
        time.sleep(0.015)  # so that a fast machine is not done before it is killed

    student, valid = make_student(), make_blocks(5, seed=9)
    distill(
        student, make_teacher(), make_blocks(), valid=valid, config=settings(epochs=2.0), seed=3, out=out, resume=True,
        progress=linger,
    )  # fmt: skip
    torch.save(student.state_dict(), final)


@pytest.mark.parametrize("tries", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_go_on_bit_exactly(straight, tmp_path, tries):
    """SIGKILL at random moments, up to three times in one run, then to the end."""
    context, rng = multiprocessing.get_context("forkserver"), random.Random(tries)
    context.set_forkserver_preload(["transformers.models.mixtral.modeling_mixtral", "moe2dense.distillation.trainer"])
    killed = 0
    for attempt in range(tries):
        final, kills = tmp_path / f"{attempt}.pt", 3
        while not final.exists():
            started = context.Event()
            process = context.Process(target=train_to_the_end, args=(tmp_path / str(attempt), final, started))
            process.start()
            assert started.wait(100)
            process.join(rng.uniform(0, 0.3) if kills else 100)
            if process.exitcode is None:
                process.kill()
                killed += 1
            process.join()
            kills -= kills > 0
        assert same(torch.load(final, weights_only=True), straight[1])
    assert killed >= tries / 2


def test_a_half_written_checkpoint_is_not_seen(straight, teacher, tmp_path):
    options = dict(config=settings(epochs=2.0), valid=make_blocks(5, seed=9), seed=3, out=tmp_path)
    (tmp_path / "checkpoints/.writing-6").mkdir(parents=True)
    (tmp_path / "checkpoints/.writing-6/weights.safetensors").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    student = make_student()
    distill(student, teacher, make_blocks(), resume=True, **options)
    assert same(weights(student), straight[1])


def test_a_damaged_checkpoint_is_named(straight, teacher, tmp_path):
    options = dict(config=settings(), out=tmp_path)
    distill(make_student(), teacher, make_blocks(), **options)
    path = tmp_path / "checkpoints/step-000006/weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="step-000006 cannot be read"):
        distill(make_student(), teacher, make_blocks(), resume=True, **options)


def test_other_settings_or_text_are_refused(teacher, tmp_path):
    distill(make_student(), teacher, make_blocks(), config=settings(), out=tmp_path)
    with pytest.raises(UserError, match="holds a training run"):
        distill(make_student(), teacher, make_blocks(), config=settings(), out=tmp_path)
    with pytest.raises(UserError, match=r"made with lr=0.003 \(now 0.1\)"):
        distill(make_student(), teacher, make_blocks(), config=settings(lr=0.1), out=tmp_path, resume=True)
    with pytest.raises(UserError, match="made with text="):
        distill(make_student(), teacher, make_blocks(seed=8), config=settings(), out=tmp_path, resume=True)
    other = make_blocks()
    other.input_ids[11, 5] = 60 - other.input_ids[11, 5]  # not in the first block, nor in the last
    with pytest.raises(UserError, match="made with text="):
        distill(make_student(), teacher, other, config=settings(), out=tmp_path, resume=True)
    learnt = torch.ones(24, 12, dtype=torch.bool)
    learnt[7, :4] = False
    with pytest.raises(UserError, match="made with tokens to learn="):
        blocks = make_blocks(labels_mask=learnt)
        distill(make_student(), teacher, blocks, config=settings(), out=tmp_path, resume=True)


def test_a_run_goes_on_with_the_targets_it_began_with(teacher, tmp_path):
    """Of whichever folder they lie in; other answers to the same text are refused."""
    blocks, stores = make_blocks(), {}
    for name, k in (("few", 4), ("again", 4), ("more", 8)):
        stores[name] = open_targets(write_targets(teacher, blocks, tmp_path / name, format="topk", k=k), blocks)
    options = dict(data=blocks, config=settings(), out=tmp_path / "out", resume=True)
    distill(make_student(), targets=stores["few"], **options)
    distill(make_student(), targets=stores["again"], **options)
    with pytest.raises(UserError, match=r"made with targets=topk-.* \(now topk-"):
        distill(make_student(), targets=stores["more"], **options)


def test_full_disk_is_one_sentence(teacher, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe2dense.distillation.checkpoints.save_file", full)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        distill(make_student(), teacher, make_blocks(), config=settings(), out=tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("saved", [True, False])
def test_nan_names_the_block_after_one_retry(teacher, tmp_path, saved):
    blocks = make_blocks()
    targets = hidden_targets(teacher, blocks)
    guilty = step_blocks(24, 4, 4, 0)[2]
    targets.hidden[guilty, 3] = float("nan")
    with pytest.raises(UserError, match=f"step 5 of 6.*block {guilty} .domain 'domain {guilty % 3}'") as results:
        distill(make_student(), data=blocks, targets=targets, config=settings(), out=tmp_path if saved else None)
    assert ("going back" in str(results.value)) == saved and blocks[[guilty]].keys()[0] in str(results.value)


def test_a_passing_fault_is_survived(teacher, tmp_path, straight):
    class Flaky(ResidentTargets):
        calls = 0

        def batch(self, indices):
            rows = super().batch(indices)
            self.calls += 1
            if self.calls == 5:
                rows.hidden[0] = float("inf")
            return rows

    student = make_student()
    distill(
        student, data=make_blocks(), targets=Flaky(teacher, make_blocks()), valid=make_blocks(5, seed=9),
        valid_targets=hidden_targets(teacher, make_blocks(5, seed=9)), config=settings(epochs=2.0), seed=3, out=tmp_path,
    )  # fmt: skip
    for name, expected in straight[1].items():
        torch.testing.assert_close(student.state_dict()[name], expected, rtol=1e-4, atol=1e-5)
