"""Several processes train to the same weights as one, at the same global batch."""

import contextlib
import dataclasses
import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from moe2dense.common.processes import join_processes, leave_processes
from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.weights import sharded
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank, world, port):
    """Make this process one of `world` on the CPU, with one thread."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)


def launch(work, world, *arguments):
    """What rank 0 of `world` processes puts into the queue: weights and numbers. work(rank, world, port, *arguments, queue)."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["transformers.models.mixtral.modeling_mixtral", "moe2dense.distillation.trainer"])
    queue = context.Queue()
    processes = [context.Process(target=work, args=(r, world, port, *arguments, queue)) for r in range(world)]
    for p in processes:
        p.start()
    state, kls = queue.get(timeout=120)
    for p in processes:
        p.join(60)
    assert all(p.exitcode == 0 for p in processes)
    return {k: torch.from_numpy(v) for k, v in state.items()}, kls


def worker(rank, world, port, out, options, queue):
    as_rank(rank, world, port)
    from moe2dense.distillation.api import distill

    warnings.filterwarnings("error", "FSDP2-wrapped module")
    sharded.FILE_BYTES = options.pop("file_bytes", sharded.FILE_BYTES)

    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == stop_at:
            raise InterruptedError

    student, blocks, stop_at = (
        make_student(torch.float64),
        make_blocks(options.pop("blocks")),
        options.pop("stop_at", None),
    )
    valid, teacher, store = make_blocks(5, seed=9), make_teacher(torch.float64), options.pop("store", None)
    if store is not None:
        options |= {"targets": open_targets(store, blocks), "valid_targets": hidden_targets(teacher, valid)}
        teacher = None
    kls: list = []
    with contextlib.suppress(InterruptedError):
        result = distill(student, teacher, blocks, valid=valid, out=out, seed=3, progress=stop, **options)
        kls = [r["valid_kl"] for r in result.history if "valid_kl" in r]
    if rank == 0:
        local = {k: getattr(v, "to_local", lambda v=v: v)() for k, v in student.state_dict().items()}
        queue.put(({k: v.numpy() for k, v in local.items()}, kls))
    leave_processes()


def train(world, out, **options):
    return launch(worker, world, out, dict(options))


def close(a, b):
    for name in a[0]:
        torch.testing.assert_close(a[0][name], b[0][name], rtol=1e-9, atol=1e-9, msg=name)
    assert a[1] == pytest.approx(b[1], rel=1e-9)


def test_two_processes_equal_one(tmp_path):
    """20 steps in float64; 5 blocks a step, so that one process has an empty pass."""
    config = settings(epochs=5.0, batch=60, micro_batch=2, alpha=0.2, features="mse:learned")
    options = {"config": config, "blocks": 20}
    close(train(2, tmp_path / "two", **options), train(1, tmp_path / "one", **options))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    options = {"config": settings(epochs=2.0, batch=60, save_every=4), "blocks": 20}
    whole = train(1, tmp_path / "whole", **options)
    train(2, tmp_path / "part", stop_at=6, **options)
    assert Checkpoints(tmp_path / "part/checkpoints").steps()[-1] == 4
    close(train(1, tmp_path / "part", resume=True, **options), whole)


def test_sharded_training_equals_one_process(tmp_path):
    """FSDP2: 20 steps in float64; the parameters are really spread, and checkpoints are whole."""
    options = {"config": settings(epochs=5.0, batch=60, micro_batch=2), "blocks": 20}
    one = train(1, tmp_path / "one", **options)
    options["config"] = dataclasses.replace(options["config"], shard=True)
    shards, kls = train(2, tmp_path / "two", **options)
    checkpoints = Checkpoints(tmp_path / "two/checkpoints")
    parts = sorted((checkpoints.path(checkpoints.steps()[-1]) / "weights").iterdir())
    assert len(parts) == 2, "each process writes its own part"
    whole = sum(v.nbytes for v in one[0].values())
    assert all(0.3 * whole < p.stat().st_size < 0.7 * whole for p in parts)
    assert kls == pytest.approx(one[1], rel=1e-9)
    assert any(v.numel() < one[0][k].numel() for k, v in shards.items())
    model = make_student(torch.float64)
    Checkpoints(tmp_path / "two/checkpoints").load_weights(model)
    close((model.state_dict(), kls), one)


def test_a_sharded_run_goes_on_in_one_process_and_back(tmp_path):
    options = {"config": settings(epochs=2.0, batch=60, save_every=2, shard=True), "blocks": 20, "file_bytes": 9000}
    whole = train(1, tmp_path / "whole", **options)
    train(2, tmp_path / "part", stop_at=2, **options)
    files = [p.stat().st_size for p in tmp_path.glob("part/checkpoints/step-000002/optimizer/*")]
    assert len(files) > 4 and max(files) < 14_000, "a part is written as several files, their headers included"
    train(1, tmp_path / "part", stop_at=4, resume=True, **options)
    _, kls = train(2, tmp_path / "part", resume=True, **options)
    assert kls == pytest.approx(whole[1], rel=1e-9)
    model = make_student(torch.float64)
    Checkpoints(tmp_path / "part/checkpoints").load_weights(model)
    close((model.state_dict(), kls), whole)


def train_twice(rank, world, port, out, queue):
    as_rank(rank, world, port)
    from moe2dense.distillation.api import distill

    states = []
    with join_processes():
        for name in ("student", "control"):
            student = make_student(torch.float64)
            distill(student, make_teacher(torch.float64), make_blocks(4), config=settings(), out=out / name, seed=3)
            states.append({k: v.numpy() for k, v in student.state_dict().items()})
    assert all((states[1][k] == v).all() for k, v in states[0].items())
    queue.put((states[0], []))


def test_the_only_process_of_a_launcher_trains_twice(tmp_path):
    """As a conversion does, whose control is trained after the student."""
    launch(train_twice, 1, tmp_path)


def write_share(rank, world, port, folder):
    as_rank(rank, world, port)
    torch.distributed.init_process_group("gloo")
    for name in TARGET_FORMATS:
        write_targets(make_teacher(), make_blocks(19), folder / name, name, seed=4)
        assert len(open_targets(folder / name, make_blocks(19))) == 19  # whole on every process
    leave_processes()


def test_several_processes_write_the_store_of_one_and_read_it(tmp_path):
    context, port, blocks = multiprocessing.get_context("forkserver"), free_port(), make_blocks(19)
    context.set_forkserver_preload(["transformers.models.mixtral.modeling_mixtral", "moe2dense.distillation.trainer"])
    processes = [context.Process(target=write_share, args=(r, 2, port, tmp_path)) for r in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(100)
    assert all(p.exitcode == 0 for p in processes)
    for name in TARGET_FORMATS:
        both = open_targets(tmp_path / name, blocks)
        assert [s["from"] for s in both.manifest["shards"]] == [0, 10]
        one = open_targets(write_targets(make_teacher(), blocks, tmp_path / f"one {name}", name, seed=4), blocks)
        assert len(one.manifest["shards"]) == 1
        rows = [vars(s.batch(range(19))) for s in (both, one)]
        for key, value in rows[0].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, rows[1][key]), (name, key)
    options = {"config": settings(epochs=2.0, batch=60, micro_batch=2), "blocks": 19, "store": tmp_path / "hidden"}
    close(train(2, tmp_path / "two", **options), train(1, tmp_path / "alone", **options))


LAUNCHED = """
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings

from moe2dense.training import distill

student, spread = make_student(), []
distill(
    student, make_teacher(), make_blocks(20), config=settings(epochs=2.0, batch=60, micro_batch=2), out=sys.argv[1], seed=3,
    progress=lambda *_, **__: spread.append(any(isinstance(p, DTensor) for p in student.parameters())),
)
assert any(spread) == (int(sys.argv[2]) > 1), "weights are not spread over the processes"
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_accelerates_own_fsdp2_launch(tmp_path):
    """`accelerate launch --use_fsdp` trains to what one GPU does, in bf16."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    wrap = [
        "--fsdp_auto_wrap_policy",
        "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap",
        "MistralDecoderLayer",
    ]
    results = []
    for world, flags in (("1", []), ("2", ["--use_fsdp", "--fsdp_version", "2", *wrap])):
        out = tmp_path / world
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", world, *flags]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([*launch, str(script), str(out), world], check=True, timeout=300, env=environment)
        model = make_student()
        Checkpoints(out / "checkpoints").load_weights(model)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-2, atol=2e-2, msg=name)
