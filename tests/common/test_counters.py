"""The counters of a run, and the formulas that counters and plan share, against torch's count of the operations."""

import threading

import pytest
import torch

from moe2dense.common import flops
from moe2dense.common.costs import Cost, cost_of_all
from moe2dense.common.counters import count_bus, count_disk, count_flops, metered
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.local import local
from moe2dense.student.ffn.obs import eliminate
from moe2dense.student.ffn.refit import grams
from moe2dense.student.ffn.ridge import ridge_solve
from tests.flop_counting import counted


def ffn(width, hidden):
    return DenseFFN(torch.randn(width, hidden), torch.randn(width, hidden), torch.randn(hidden, width))


def test_costs_are_those_of_the_context_alone():
    count_flops(1e6)
    with metered() as outer:
        count_flops(100.0)
        with metered() as inner:
            count_flops(7.0, "cuda")
            count_disk(11)
        count_bus(13)
    count_disk(1000)
    assert outer.flops == {"cpu": 100.0, "cuda": 7.0} and (outer.disk, outer.bus) == (11, 13)
    assert inner.flops == {"cuda": 7.0} and (inner.disk, inner.bus) == (11, 0)
    assert (outer - inner).flops == {"cpu": 100.0} and (outer - inner).disk == 0
    assert (outer + inner).flops == {"cpu": 100.0, "cuda": 14.0} and Cost(**outer.to_dict()) == outer


def test_processes_cost_what_they_cost_together():
    first = Cost({"cpu": 100.0}, disk=5, bus=1, memory=900, began=100, gpu_memory=40, seconds=2.0, peak=1e12)
    second = Cost({"cuda": 7.0}, disk=6, bus=2, memory=700, began=300, gpu_memory=70, seconds=3.0, peak=1e12)
    both = cost_of_all([first, second])
    assert both.flops == {"cpu": 100.0, "cuda": 7.0} and (both.disk, both.bus, both.seconds) == (11, 3, 3.0)
    assert (both.memory, both.began, both.gpu_memory) == (900, 100, 70)
    assert both.memory_of_each == [900, 700] and both.gpu_memory_of_each == [40, 70]
    assert both.utilisation == 7.0 / (3.0 * 2e12), "of both GPUs' speed"
    assert cost_of_all([first]) == first
    later = both + cost_of_all([first, first, second])
    assert later.memory_of_each == [900, 900, 700] and (later.disk, later.seconds) == (27, 6.0)
    assert Cost.from_dict(later.to_dict()) == later


def test_the_peak_of_memory_is_the_context_s_own():
    with metered() as outer:
        held = torch.ones(48_000_000)  # 192 MB
        del held
        with metered() as inner:
            small = torch.ones(12_000_000)
            del small
    assert outer.memory - outer.began > 180e6
    assert inner.memory - inner.began < 120e6


def test_the_peak_of_a_context_within_is_no_other_s():
    """A training that first has targets stored holds no more than it does itself."""
    with metered() as outer, metered() as inner:
        held = torch.ones(48_000_000)
        del held
    assert inner.memory - inner.began > 180e6
    assert outer.memory - outer.began < 120e6


def test_threads_lose_nothing():
    def work():
        for _ in range(5000):
            count_disk(3)

    with metered() as cost:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert cost.disk == 60_000


@pytest.mark.parametrize(("tokens", "width", "hidden"), [(37, 61, 24), (300, 1100, 48)])
def test_gram_matrices_cost_what_torch_counts(tokens, width, hidden):
    x, target = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    with counted() as cost:
        grams(ffn(width, hidden), x, target)
    assert cost.ours == cost.torch == flops.gram(tokens, width, hidden)


@pytest.mark.parametrize(("pool", "width", "step"), [(200, 61, 1), (700, 100, 3), (600, 599, 40)])
def test_an_elimination_costs_what_the_plan_says(pool, width, step):
    hidden, h = 20, torch.randn(900, pool)
    gram, cross = h.T @ h, torch.randn(pool, hidden)
    with counted() as cost:
        eliminate(gram, cross, torch.randn(pool, hidden), width, block=step)
    assert cost.ours == pytest.approx(flops.elimination(pool, hidden, width, step), rel=1e-9)
    not_counted_by_torch = flops.cholesky(pool) + flops.product(pool, pool, hidden) + 2 * pool**3 / 3
    assert cost.ours - not_counted_by_torch == pytest.approx(cost.torch, rel=0.01)


def test_a_ridge_solution_costs_what_the_plan_says():
    h, cross, start = torch.randn(90, 30), torch.randn(30, 12), torch.randn(30, 12)
    with counted() as cost:
        ridge_solve(h.T @ h, cross, start, 0.1)
    assert cost.ours == flops.ridge_solve(30, 12)


def test_a_fit_of_an_ffn_costs_what_torch_counts():
    x, target, held_out = torch.randn(200, 24), torch.randn(200, 24), torch.arange(200) < 20
    with counted() as cost:
        local(ffn(40, 24), x, target, held_out, steps=6, batch=32)
    assert cost.ours == pytest.approx(cost.torch, rel=0.001)
    steps, checks = 6 * flops.trained_ffn(32, 40, 24), 7 * flops.gated_ffn(20, 40, 24)
    assert cost.ours == pytest.approx(steps + checks, rel=0.001)
