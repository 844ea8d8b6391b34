"""Building on another device: nothing is left on the CPU by mistake, and a GPU finds what the CPU does."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from moe2dense.student import memory as places
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.ffn.local import local
from moe2dense.student.ffn.obs import eliminate
from moe2dense.student.ffn.refit import grams, refit, ridge_solve
from moe2dense.student.memory import device_with_room

H, M, T = 6, 9, 50


class Apart(Tensor):
    """A tensor that says it is on the device `meta`, and has its values in `inner`."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype, device="meta")

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("only used within OtherDevice")


class OtherDevice(TorchDispatchMode):
    """Within the context `meta` is a device with values, which an operation mixes with the CPU's no more than it could a GPU's."""

    def __init__(self):
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        apart = [isinstance(t, Apart) for t in tensors if t.ndim > 0 or isinstance(t, Apart)]
        name = func.overloadpacket.__name__
        assert name in ("_to_copy", "copy_") or all(apart) or not any(apart), f"{func} mixes devices"
        there = any(apart)
        if kwargs.get("device") is not None:
            there, kwargs["device"] = torch.device(kwargs["device"]).type == "meta", torch.device("cpu")
        if there:
            self.operations.add(name)
        own = tree_map(lambda t: t.inner if isinstance(t, Apart) else t, (args, kwargs))
        out = func(*own[0], **own[1])
        written = [
            kwargs.get(a.name) if a.kwarg_only else args[i]
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write and (a.kwarg_only or i < len(args))
        ]
        if written and func._schema.returns and isinstance(written[0], Apart):
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda t: Apart(t) if there and isinstance(t, Tensor) else t, out)


@pytest.fixture
def other() -> Iterator[OtherDevice]:
    with OtherDevice() as mode:
        yield mode


def ffn(bias: bool = False, width: int = M, seed: int = 0) -> DenseFFN:
    g = torch.Generator().manual_seed(seed)
    shapes = [(width, H), (width, H), (H, width), *([(width,), (width,), (H,)] if bias else [])]
    return DenseFFN(*(torch.randn(shape, generator=g) for shape in shapes))  # type: ignore[arg-type]  # as many as there are shapes


def task(bias: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(3))
    return x, ffn(bias, M + 3, seed=1)(x)


def test_the_pretended_device_refuses_what_a_gpu_would(other):
    there = torch.ones(3, 3).to("meta")
    assert there.device.type == "meta" and (there @ there).cpu().tolist() == [[3.0] * 3] * 3
    with pytest.raises(AssertionError, match="mixes devices"):
        _ = there @ torch.ones(3, 3)


@pytest.mark.parametrize("bias", [False, True])
def test_gram_matrices_refit_and_elimination_stay_where_they_are_told(bias, other):
    x, target = task(bias)
    gram, cross = grams(ffn(bias), x, target, chunk=20, device="meta")
    want_gram, want_cross = grams(ffn(bias), x, target, chunk=20)
    assert isinstance(gram, Apart) and isinstance(cross, Apart) and torch.equal(gram.cpu(), want_gram)
    start = torch.randn(len(want_gram), H)
    solved = ridge_solve(gram, cross, start, 1e-3)
    assert not isinstance(solved, Apart) and "linalg_cholesky_ex" in other.operations
    assert torch.equal(solved, ridge_solve(want_gram, want_cross, start, 1e-3))
    for limit in (0, 4):
        got, want = (refit(ffn(bias), x, target, limit=limit, device=d) for d in ("meta", "cpu"))
        assert not isinstance(got.down, Apart)
        for a, b in zip(got.parameters(), want.parameters(), strict=True):
            assert torch.equal(a, b)
    kept = eliminate(gram, cross, start.to("meta"), 4, block=2)
    assert isinstance(kept, Apart)
    assert torch.equal(kept.cpu(), eliminate(want_gram, want_cross, start, 4, block=2))


@pytest.mark.parametrize("bias", [False, True])
def test_the_local_fit_stays_where_it_is_told(bias, other):
    x, target = task()
    held_out = torch.arange(T) % 5 == 0
    want, as_known = local(ffn(bias), x, target, held_out, steps=5, batch=16)
    assert not other.operations
    got, result = local(ffn(bias), x, target, held_out, steps=5, batch=16, device="meta")
    assert result == as_known and "silu_backward" in other.operations
    for a, b in zip(want.parameters(), got.parameters(), strict=True):
        assert not isinstance(b, Apart) and torch.equal(a, b)
    assert relative_error(got.to("meta"), x, target) == relative_error(got, x, target)


def test_a_full_gpu_leaves_the_work_to_the_cpu(monkeypatch):
    monkeypatch.setattr(places, "free_bytes", lambda device: 1000)
    assert device_with_room("cuda:1", 1000) == torch.device("cuda:1") and device_with_room(
        "cuda", 1001
    ) == torch.device("cpu")
    assert device_with_room("cpu", 10**15) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_what_the_cpu_does():
    """Larger than a panel, with downdates that wait and a smaller matrix in between."""
    big = ffn(width=1500)
    x = torch.randn(4000, H)
    target = ffn(width=64, seed=2)(x)
    (gram, cross), (want_gram, want_cross) = (grams(big, x, target, device=d) for d in ("cuda", "cpu"))
    for got, want in ((gram, want_gram), (cross, want_cross)):
        assert got.is_cuda and float((got.cpu() - want).norm()) < 1e-5 * float(want.norm())
    doubles = [t.double() for t in (want_gram, want_cross, big.down.T)]
    kept = [set(eliminate(*(t.to(d) for t in doubles), 600, block=6).tolist()) for d in ("cuda", "cpu")]
    assert len(kept[0] & kept[1]) > 590  # near ties may fall either way
    for limit in (0, 700):
        got, want = (refit(big, x, target, limit=limit, device=d) for d in ("cuda", "cpu"))
        assert abs(relative_error(got, x, target) - relative_error(want, x, target)) < 1e-3
    held_out = torch.arange(len(x)) % 7 == 0
    fits = [local(big, x, target, held_out, steps=20, batch=256, device=d) for d in ("cuda", "cpu")]
    assert fits[0][0].down.device.type == "cpu" and fits[0][1].after == pytest.approx(fits[1][1].after, rel=0.05)
    assert places.free_bytes(torch.device("cuda")) > 0
