"""Sharded checkpoints are written while training goes on; a run that stops at any moment goes on to the weights of one that did not."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from moe2dense.common.mirror import Mirror
from moe2dense.common.object_store import ObjectStore
from moe2dense.common.processes import leave_processes
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.errors import UserError
from tests.distillation.test_processes import as_rank, free_port
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings

pytestmark = pytest.mark.slow
PATIENCE = 60


def leave(monkeypatch):
    """Stop after step 3. The checkpoint of step 2 is written only then, of weights that have changed since."""
    trained, write = threading.Event(), HuggingFaceStorageWriter.write_data

    def late(self, plan, planner):
        if "step-000002" in str(self.path):
            assert trained.wait(PATIENCE)
        return write(self, plan, planner)

    def progress(stage, done, total, **_):
        if stage == "distill" and done == 3:
            trained.set()
            raise InterruptedError

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", late)
    return progress


def ask_to_stop(rank, number, monkeypatch):
    """Send this process a signal after step 3; what is written takes a while."""

    def progress(stage, done, total, **_):
        if stage == "distill" and done == 3 and rank == 0:
            os.kill(os.getpid(), number)

    write = HuggingFaceStorageWriter.write_data

    def slow(self, plan, planner):
        time.sleep(1)
        return write(self, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", slow)
    return progress


def die_while_writing(rank, who, monkeypatch):
    """Kill the processes `who` while they write the checkpoint of step 4, after the others wrote theirs and training made step 5."""
    trained, write = threading.Event(), HuggingFaceStorageWriter.write_data

    def kill(self, plan, planner):
        if "step-000004" in str(self.path) and rank in who:
            if str(self.path).endswith("optimizer"):
                write(self, plan, planner)
            assert trained.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    def progress(stage, done, total, **_):
        if stage == "distill" and done == 5:
            if rank in who:
                trained.set()
                time.sleep(PATIENCE)  # killed meanwhile
            raise InterruptedError

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", kill)
    return progress


def fill_disk(rank, monkeypatch):
    """Let the second process find a full disk at step 4."""
    write = HuggingFaceStorageWriter.write_data

    def full(self, plan, planner):
        if "step-000004" in str(self.path) and rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)


def leave_after_step_5(stage, done, total, **_):
    """Stop one step after the checkpoint of step 4."""
    if stage == "distill" and done == 5:
        raise InterruptedError


def worker(rank, port, out, resume, stop, argument):
    """Train as one of two processes; the exit code says how it ended: 0 done, 3 left, 4 asked to stop, 2 a full disk, 6 unreadable."""
    as_rank(rank, 2, port)
    from moe2dense.distillation.api import distill

    with pytest.MonkeyPatch.context() as monkeypatch:
        progress = after_save = None
        if stop == "mirror":
            progress, after_save = leave_after_step_5, Mirror(ObjectStore(argument, "--mirror"), out).update
        if stop == "leave":
            progress = leave(monkeypatch)
        elif stop == "signal":
            progress = ask_to_stop(rank, argument, monkeypatch)
        elif stop == "die":
            progress = die_while_writing(rank, argument, monkeypatch)
        elif stop == "full":
            fill_disk(rank, monkeypatch)
        config = settings(epochs=2.0, batch=60, micro_batch=2, save_every=2, shard=True)
        options = dict(
            valid=make_blocks(5, seed=9),
            config=config,
            seed=3,
            out=out,
            resume=resume,
            progress=progress,
            after_save=after_save,
        )
        try:
            distill(make_student(), make_teacher(), make_blocks(20), **options)
        except InterruptedError:
            os._exit(3)
        except KeyboardInterrupt:
            os._exit(4)
        except UserError as error:
            os._exit(2 if "disk is full" in str(error) else 6 if "cannot be read" in str(error) else 5)
    leave_processes()


def train(out, resume=False, stop="", argument=None) -> list[int]:
    """Return the exit codes of two processes that train."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["transformers.models.mixtral.modeling_mixtral", "moe2dense.distillation.trainer"])
    processes = [context.Process(target=worker, args=(r, port, out, resume, stop, argument)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * PATIENCE)
        process.kill()
    return [process.exitcode for process in processes]


def contents(out):
    """Weights, optimiser and state of the last checkpoint."""
    checkpoints = Checkpoints(out / "checkpoints")
    return checkpoints.load(checkpoints.steps()[-1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert train(out) == [0, 0]
    return out


def goes_on(out, straight):
    """Resume, and compare every bit of weights and optimiser with those of the run that was not stopped."""
    assert train(out, resume=True) == [0, 0]
    weights, optimizer, state = contents(out)
    expected_weights, expected_optimizer, expected_state = contents(straight)
    for ours, expected in ((weights, expected_weights), (optimizer, expected_optimizer)):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert state == expected_state and state["step"] == 8
    assert not list((out / "checkpoints").glob(".*")), "what a killed run left is removed"


def test_a_run_stopped_between_saves_goes_on(straight, tmp_path):
    assert train(tmp_path, stop="leave") == [3, 3]
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 2
    goes_on(tmp_path, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_finishes_what_it_writes(straight, tmp_path, number):
    assert train(tmp_path, stop="signal", argument=number) == [4, 4]
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 3
    goes_on(tmp_path, straight)


@pytest.mark.parametrize("who", [(0, 1), (0,), (1,)])
def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(straight, tmp_path, who):
    """Training makes a step meanwhile. A process that lives finds that its peer is gone."""
    codes = train(tmp_path, stop="die", argument=who)
    assert all(codes[rank] == -signal.SIGKILL for rank in who) and 0 not in codes, codes
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 2
    assert (tmp_path / "checkpoints/.step-000004.partial-0-shards").is_dir()
    goes_on(tmp_path, straight)


def test_a_full_disk_of_one_process_stops_all(straight, tmp_path):
    assert train(tmp_path, stop="full") == [2, 2]
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 2
    goes_on(tmp_path, straight)


@pytest.mark.parametrize("folder", ["weights", "optimizer"])
def test_a_damaged_part_is_refused_in_one_sentence(straight, tmp_path, folder):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    part = next((checkpoints.path(8) / folder).iterdir())
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match="step-000008 cannot be read"):
        checkpoints.load(8)
    assert train(tmp_path, resume=True) == [6, 6]
