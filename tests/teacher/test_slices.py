"""Experts and the head work a slice at a time in memory that is used again: the same numbers, whatever the slices."""

import pytest
import torch
from torch.nn.functional import linear, silu

from moe2dense.teacher import experts as experts_module
from moe2dense.teacher import lm_head as head_module
from moe2dense.teacher.buffers import Scratch
from moe2dense.teacher.experts import ExpertWeights
from moe2dense.teacher.lm_head import LMHead
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make


def swiglu(gate, up):
    return silu(gate) * up


def expert(hidden, width, stored, bias, dtype=torch.float32):
    g, u, d = (torch.randn(size).to(stored) for size in ((width, hidden), (width, hidden), (hidden, width)))
    biases = (torch.randn(width), torch.randn(width), torch.randn(hidden)) if bias else (None, None, None)
    return ExpertWeights(g, u, d, swiglu, dtype, biases)


def reference(e, x):
    """In float64, all at once."""
    g, u, d = (t.double() for t in e.stored)
    biases = [None if b is None else b.double() for b in (e.gate_bias, e.up_bias, e.down_bias)]
    hidden = swiglu(linear(x.double(), g, biases[0]), linear(x.double(), u, biases[1]))
    return hidden, linear(hidden, d, biases[2])


@pytest.mark.parametrize("neurons", [1, 5, 37, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_slices_of_an_expert(neurons, bias, stored, monkeypatch):
    monkeypatch.setattr(experts_module, "_SLICE_BYTES", neurons * 11 * 4)
    monkeypatch.setattr(experts_module, "_ACTIVATION_BYTES", neurons * 4 * 256)  # 256 rows at once
    scratch = Scratch()
    for width, rows in ((37, 300), (13, 1), (41, 513)):  # one after another in the same memory
        e, x = expert(11, width, stored, bias), torch.randn(rows, 11)
        hidden, y = reference(e, x)
        for given in (None, scratch):
            got = e(x, given)
            assert (got - y).abs().max() <= 1e-5 * y.abs().max()
            assert (e.hidden(x, given) - hidden).abs().max() <= 1e-5 * hidden.abs().max()
            assert (e.output(hidden.float(), given) - y).abs().max() <= 1e-5 * y.abs().max()
        assert torch.equal(e(x, scratch), e(x))


def test_gradients_reach_the_input():
    e, x = expert(11, 37, torch.bfloat16, True), torch.randn(7, 11, requires_grad=True)
    e(x).square().sum().backward()
    want = x.detach().double().requires_grad_()
    reference(e, want)[1].square().sum().backward()
    assert x.grad is not None and want.grad is not None
    assert (x.grad - want.grad).abs().max() <= 1e-5 * want.grad.abs().max()


def test_half_precision_is_summed_once(monkeypatch):
    """Adding up slices in bf16 would round after each of them."""
    monkeypatch.setattr(experts_module, "_SLICE_BYTES", 1)
    e = expert(16, 64, torch.bfloat16, False, dtype=torch.bfloat16)
    assert e._spans() == [slice(0, 64)]


@pytest.mark.parametrize("name", ["gpt_oss", "phimoe", "llama4_text", "granitemoe"])
def test_slices_of_every_kind_of_gating(name, tmp_path, monkeypatch):
    model = make(name, tmp_path)
    ids = blocks(model, n=3, s=17)
    monkeypatch.setattr(experts_module, "_SLICE_BYTES", 5 * 24 * 4)
    teacher = load_teacher(tmp_path)
    sparse = next(layer for layer in map(teacher.layer, range(3)) if layer.experts is not None)
    assert sparse.experts is not None and len(sparse.experts[0]._spans()) == 3
    want = model(ids).logits
    assert (teacher.run(ids).logits - want).abs().max() <= 1e-4 * max(1.0, want.abs().max())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 3.0)])
def test_logits_in_parts(stored, bias, softcap, monkeypatch):
    weight, hidden = torch.randn(53, 11).to(stored), torch.randn(2, 19, 11)
    b = torch.randn(53) if bias else None
    want = 0.5 * linear(hidden.double(), weight.double(), None if b is None else b.double())
    want = softcap * torch.tanh(want / softcap) if softcap else want
    monkeypatch.setattr(head_module, "_SLICE_BYTES", 7 * 11 * 4)
    head = LMHead(weight, b, 0.5, softcap)
    assert (head.logits(hidden) - want).abs().max() <= 1e-5
    seen, memory = [], set()
    for rows, part in head.chunks(hidden.flatten(0, 1), tokens=7):
        assert part.shape == (rows.stop - rows.start, 53)
        assert (part - want.flatten(0, 1)[rows]).abs().max() <= 1e-5
        seen += range(rows.start, rows.stop)
        memory.add(part.data_ptr())
    assert seen == list(range(38)) and len(memory) == 1


@pytest.mark.parametrize("memory", ["auto", "17MB"])
def test_a_teachers_logits_never_exist_whole(memory, tmp_path):
    model = make("granitemoe", tmp_path)
    ids = blocks(model, n=3, s=17)
    teacher = load_teacher(tmp_path, memory=memory)
    teacher.resident = memory == "auto"
    hidden = teacher.run(ids, logits=False).hidden_states
    want = model(ids).logits.flatten(0, 1)
    rows = [(r, part.clone()) for r, part in teacher.logits(hidden, tokens=20)]
    assert [r for r, _ in rows] == [slice(0, 20), slice(20, 40), slice(40, 51)]
    assert (torch.cat([part for _, part in rows]) - want).abs().max() <= 1e-4
