"""The megablocks backend against our own experts.

On CPU this is an EMULATION: megablocks' real ParallelDroplessMLP (its Python source must be importable), with its CUDA and Triton
operations replaced by plain torch: sort, histogram, cumulative sum, gather, scatter, grouped product. The GPU test runs the real thing.
"""

import importlib.util
import sys
import types
import typing

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.teacher import backends
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, blocks, make

needs_source = pytest.mark.skipif(
    importlib.util.find_spec("megablocks") is None, reason="megablocks' source is not importable"
)


def _gmm(a, b, sizes, trans_a=False, trans_b=False):
    assert not trans_a and int(sizes.sum()) == len(a)
    parts = a.split(sizes.tolist())
    return torch.cat([p @ (w.T if trans_b else w) for p, w in zip(parts, b, strict=True)])


def _sort(x, end_bit, out, order):
    values, index = torch.sort(x, stable=True)
    out.copy_(values)
    order.copy_(index)


def _gather(x, indices, bin_ids, weights, bins, top_k):
    return x[indices.long() // top_k]


def _scatter(x, indices, bin_ids, weights, bins, top_k):
    out = torch.empty_like(x)
    out[indices.long()] = x * weights[indices.long()][:, None]
    return out.view(-1, top_k, x.shape[1]).sum(1)


class Anything(types.ModuleType):
    """Stands in for a module: any attribute of it is another stand-in, and as a decorator it returns what it is given."""

    __path__: typing.ClassVar[list] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *a, **k: None}) if name[0].isupper() else Anything(name)

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else Anything("called")


@pytest.fixture
def emulated(monkeypatch):
    """megablocks with plain torch in place of its compiled and Triton parts."""

    for name in ("stk", "stk.ops", "stk.backend", "stk.backend.triton_kernels", "stk.backend.autocast", "triton",
                 "triton.language", "stk.matrix", "stk.random"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, Anything(name))
    compiled = types.ModuleType("megablocks_ops")
    compiled.sort = _sort  # type: ignore[attr-defined]
    compiled.histogram = lambda x, n: torch.bincount(x.long(), minlength=n).int()  # type: ignore[attr-defined]
    compiled.inclusive_cumsum = lambda x, dim, out: out.copy_(x.cumsum(dim))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megablocks_ops", compiled)
    grouped = types.ModuleType("grouped_gemm")
    grouped.backend = grouped.ops = types.SimpleNamespace(gmm=_gmm)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grouped_gemm", grouped)
    for name in [n for n in sys.modules if n == "megablocks" or n.startswith("megablocks.")]:
        monkeypatch.delitem(sys.modules, name)
    from megablocks.backend import kernels

    monkeypatch.setattr(kernels, "gather", _gather)
    monkeypatch.setattr(kernels, "scatter", _scatter)
    monkeypatch.setattr(backends, "_refusal", lambda *_: "")
    yield
    for name in [n for n in sys.modules if n == "megablocks" or n.startswith("megablocks.")]:
        sys.modules.pop(name)


@needs_source
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"])
def test_emulated_on_cpu(emulated, name, tmp_path):
    width = next(k for k in ("moe_intermediate_size", "intermediate_size") if k in FAMILIES[name])
    reference = make(name, tmp_path, **{width: 41})  # megablocks itself needs 128 neurons in a layer's experts
    ids, mask = blocks(reference), torch.ones(4, 23, dtype=torch.long)
    mask[1, 9:] = 0
    teacher = load_teacher(tmp_path, experts="megablocks")
    assert teacher.backend == "megablocks"
    want = reference(ids, attention_mask=mask).logits[mask.bool()]
    for _ in range(2):
        got = teacher.run(ids, attention_mask=mask).logits[mask.bool()]
        assert (got - want).abs().max() <= 1e-4 * max(1.0, want.abs().max())
    assert all(layer.dropless is not None for layer in teacher._layers.values() if layer.sparse)


def test_only_plain_gating(tmp_path, monkeypatch):
    make("gpt_oss", tmp_path, **FAMILIES["gpt_oss"])
    make("mixtral", tmp_path / "mixtral")
    monkeypatch.setattr(backends, "megablocks_available", lambda: "")
    with pytest.raises(UserError, match="cannot run this teacher: it needs a CUDA device"):
        load_teacher(tmp_path, experts="megablocks", device="cpu")
    assert not backends._plain_gating(load_teacher(tmp_path).layers)
    assert backends._plain_gating(load_teacher(tmp_path / "mixtral").layers)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(backends.megablocks_available()), reason="no megablocks on CUDA"
)
def test_on_gpu(tmp_path):
    make("mixtral", tmp_path, hidden_size=128, intermediate_size=256, num_attention_heads=4)
    ids = torch.randint(3, 101, (4, 64))
    want = load_teacher(tmp_path, experts="streamed", device="cuda").run(ids).logits
    got = load_teacher(tmp_path, experts="megablocks", device="cuda").run(ids).logits
    assert (got - want).abs().max() <= 0.05 * want.abs().max()
