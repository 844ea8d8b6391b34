"""Every method that is listed exists, says what it does, and gives back a layer of one expert exactly."""

import pkgutil
import subprocess
import sys

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.student.ffn.make import make_ffn
from moe2dense.student.ffn.methods import METHODS, RECIPES, built_from_teacher, parse_method
from moe2dense.student.ffn.randomized import random_ffn
from moe2dense.student.ffn.task import FFNTask
from moe2dense.student.init_spec import STEPS
from moe2dense.student.types import MIXED, NEW, SHARED
from moe2dense.teacher.routing import LayerStats

T, H, F = 40, 6, 8


def task_of(experts: int, width: int, shared: int = 0) -> FFNTask:
    """Return a layer whose experts share the weight 0.75 of every token."""
    ffns = [random_ffn(F, H, 1.0, seed=e) for e in range(experts)]
    always_on = [random_ffn(shared, H, 1.0, seed=99)] if shared else []
    stats = LayerStats.zeros(experts, H, F)
    stats.tokens += T
    stats.count += T
    stats.weight += T * 0.75 * torch.arange(1, experts + 1).flip(0) / sum(range(experts + 1))
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(0))
    alpha = stats.alpha.float()
    target = sum((a * f(x) for a, f in zip(alpha, ffns, strict=True)), torch.zeros(T, H))
    target = sum((f(x) for f in always_on), target)
    assert stats.neuron_energy is not None
    for e, f in enumerate(ffns):
        stats.neuron_energy[e] += (alpha[e] * f.hidden(x)).pow(2).sum(0)
        stats.output[e] += alpha[e] * f(x).sum(0)
    return FFNTask(width, H, x, target, always_on, ffns, stats, probability=stats.weight.float())


@pytest.mark.parametrize("name", METHODS)
def test_a_row_has_code_and_help(name):
    row = METHODS[name]
    assert callable(pkgutil.resolve_name(row.implementation)) and row.title and row.help


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
@pytest.mark.parametrize("shared", [0, 3])
def test_one_expert_comes_back_as_it_is(name, shared):
    task = task_of(1, F + shared, shared)
    ffn, provenance = make_ffn(task, name)
    torch.testing.assert_close(ffn(task.x), task.target, rtol=1e-4, atol=1e-4)
    assert provenance is not None
    assert provenance.source_expert[:shared].tolist() == [SHARED] * shared
    torch.testing.assert_close(provenance.energy_kept, provenance.energy_total)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("width", [5, F, 13, 40])
def test_every_method_fills_the_width(name, width):
    ffn, provenance = make_ffn(task_of(3, width, shared=3), name)
    assert ffn.gate.shape == ffn.up.shape == (width, H) and ffn.down.shape == (H, width)
    assert provenance is not None and len(provenance.source_expert) == len(provenance.source_neuron) == width
    assert bool((provenance.energy_kept <= provenance.energy_total * (1 + 1e-5)).all())
    assert set(provenance.source_expert.tolist()) <= {0, 1, 2, SHARED, NEW, MIXED}
    if name == "random":
        assert set(provenance.source_expert.tolist()) == {NEW}


def test_all_neurons_together_are_the_mean_routed_layer():
    task = task_of(3, 3 * F)
    for name in ("select", "obs"):
        torch.testing.assert_close(make_ffn(task, name)[0](task.x), task.target, rtol=1e-4, atol=1e-4)


def test_what_init_may_say():
    assert parse_method("obs+refit") == ("obs", ["refit"])
    assert parse_method("layerwise") == ("obs", ["refit", "local", "layer", "heal"])
    assert all(step.name == name and step.title and step.help for name, step in STEPS.items())
    for name in (*METHODS, *RECIPES):
        parse_method(name)
        assert built_from_teacher(name) and built_from_teacher(f"{name}+refit")
    assert not built_from_teacher("checkpoint")
    with pytest.raises(UserError, match="did you mean 'select'"):
        parse_method("selct")
    with pytest.raises(UserError, match="'polish' is no step"):
        parse_method("obs+polish")


def test_no_method_refits_by_itself():
    """A refit would change the output weights; what obs and select keep are the experts' own, times their weight."""
    task = task_of(3, 10)
    alpha = task.alpha
    for name in ("select", "obs"):
        ffn, provenance = make_ffn(task, name)
        assert provenance is not None
        for j, (e, i) in enumerate(zip(provenance.source_expert, provenance.source_neuron, strict=True)):
            torch.testing.assert_close(ffn.down[:, j], alpha[e] * task.experts[int(e)].down[:, i])


def test_the_rows_load_no_torch():
    code = "import sys, moe2dense.student.ffn.methods; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
