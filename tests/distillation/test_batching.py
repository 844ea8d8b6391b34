import itertools

import pytest

from moe2dense.config.schedules import learning_rate, scheduled
from moe2dense.distillation.batching import micro_batches, step_blocks, total_steps
from moe2dense.errors import UserError


def test_every_pass_sees_each_block_once():
    seen = [b for step in range(21) for b in step_blocks(10, 3, step, seed=4)]
    passes = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(p) == list(range(10)) for p in passes) and len({tuple(p) for p in passes}) > 1
    assert seen[:9] == [b for step in range(3) for b in step_blocks(10, 3, step, seed=4)]
    assert seen != [b for step in range(21) for b in step_blocks(10, 3, step, seed=5)]


def test_steps_are_whole_and_at_least_one():
    assert [total_steps(10, 3, e) for e in (1, 2, 0.1, 1.5)] == [3, 6, 1, 5]


@pytest.mark.parametrize(("blocks", "world", "size"), [(8, 1, 8), (8, 2, 3), (7, 3, 2), (2, 4, 1)])
def test_processes_share_a_step_without_loss_and_run_as_many_passes(blocks, world, size):
    shares = [micro_batches(list(range(blocks)), rank, world, size) for rank in range(world)]
    assert sorted(b for share in shares for part in share for b in part) == list(range(blocks))
    assert len({len(share) for share in shares}) == 1 and all(len(p) <= size for s in shares for p in s)


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    rates = [learning_rate(s, 100, 1e-3, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[9] == 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 1e-6
    assert rates[54] == pytest.approx(0.5e-3, rel=0.03)
    assert learning_rate(0, 1, 1e-3, 0.03) == 1e-3


def test_a_rate_may_stay_at_its_peak_and_fall_at_the_end():
    rates = [learning_rate(s, 100, 1e-3, 0.1, cooldown=0.2) for s in range(100)]
    assert rates[9:80] == [1e-3] * 71 and all(a > b for a, b in itertools.pairwise(rates[79:]))
    assert 0 < rates[-1] < 5e-5 and rates[:9] == [learning_rate(s, 100, 1e-3, 0.1) for s in range(9)]
    assert learning_rate(0, 1, 1e-3, 0.0, cooldown=0.5) > 0


def test_schedules():
    assert scheduled(0.3, 7, 9) == 0.3 == scheduled("0.3", 7, 9) == scheduled("constant:0.3", 0, 9)
    assert [scheduled("linear:1:0", s, 5) for s in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert [scheduled("cosine:0:2", s, 3) for s in range(3)] == pytest.approx([0, 1, 2])
    assert [scheduled("step:1:0.2", s, 5) for s in range(5)] == [1, 1, 0.2, 0.2, 0.2]
    assert [scheduled("step:1:0.2:0.9", s, 5) for s in range(5)] == [1, 1, 1, 1, 0.2]
    for wrong in ("ramp:0:1", "linear:1", "cosine:a:b", "lots"):
        with pytest.raises(UserError, match="schedule"):
            scheduled(wrong, 0, 2)
