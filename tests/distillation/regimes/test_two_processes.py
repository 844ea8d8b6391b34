"""Two processes train to the same weights as one, in every regime, and a run goes on with another number of them."""

import pytest
import torch

from moe2dense.common.processes import leave_processes
from moe2dense.config.training import RegimeConfig
from tests.distillation.regimes.test_peers import make_peer
from tests.distillation.test_processes import as_rank, close, launch
from tests.distillation.tiny_run import make_blocks, make_student, make_teacher, settings

pytestmark = pytest.mark.slow
NAMES = ["on-policy", "policy-gradient", "online", "mutual", "ema", "multiview", "mtp"]


def worker(rank, world, port, out, name, stop_at, resume, queue):
    as_rank(rank, world, port)
    from moe2dense.distillation.api import distill
    from moe2dense.distillation.regimes.make import make_regime

    def stop(stage, done, total, **numbers):
        if stage == "distill" and done == stop_at:
            raise InterruptedError

    double, kls = torch.float64, []
    teacher, student = make_teacher(double), make_student(double)
    options = RegimeConfig(share="linear:0.2:0.8", rollout_steps=3, teacher_mix=0.2)
    regime = make_regime(name, options, make_teacher(double), make_peer(double))
    loss = "reverse_kl" if name == "policy-gradient" else "forward_kl"
    config = settings(epochs=2.0, batch=60, micro_batch=2, alpha=0.2, save_every=4, loss=loss)
    try:
        result = distill(
            student, teacher, make_blocks(20), valid=make_blocks(5, seed=9), out=out, seed=3, config=config,
            progress=stop, regime=regime, resume=resume,
        )  # fmt: skip
        keys = ("loss", "valid_kl", "peer_loss", "teacher_ce", "head_1", "reward")
        kls = [r[k] for r in result.history for k in keys if r.get(k) is not None]
    except InterruptedError:
        pass
    if rank == 0:
        queue.put(({k: v.numpy() for k, v in student.state_dict().items()}, kls))
    leave_processes()


def train(world, out, name, stop_at=None, resume=False):
    return launch(worker, world, out, name, stop_at, resume)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_and_go_on_as_one(tmp_path, name):
    """5 blocks a step, so that one process has an empty pass."""
    one = train(1, tmp_path / "one", name)
    close(train(2, tmp_path / "two", name), one)
    train(2, tmp_path / "part", name, stop_at=6)
    close(train(1, tmp_path / "part", name, resume=True), one)
