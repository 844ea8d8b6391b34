"""Building on another device: nothing is left on the CPU by mistake, and a GPU finds what the CPU does."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe2dense.common import devices
from moe2dense.common.devices import device_with_room
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.ffn.local import local
from moe2dense.student.ffn.obs import eliminate
from moe2dense.student.ffn.refit import grams, refit
from moe2dense.student.ffn.ridge import ridge_solve
from tests.device.counts import Counts
from tests.device.pretend import PretendedCuda

H, M, T = 6, 9, 50


@pytest.fixture
def gpu() -> Iterator[Counts]:
    with PretendedCuda() as counts:
        yield counts


def ffn(bias: bool = False, width: int = M, seed: int = 0) -> DenseFFN:
    g = torch.Generator().manual_seed(seed)
    shapes = [(width, H), (width, H), (H, width), *([(width,), (width,), (H,)] if bias else [])]
    return DenseFFN(*(torch.randn(shape, generator=g) for shape in shapes))  # type: ignore[arg-type]  # as many as there are shapes


def task(bias: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(3))
    return x, ffn(bias, M + 3, seed=1)(x)


@pytest.mark.parametrize("bias", [False, True])
def test_gram_matrices_refit_and_elimination_stay_where_they_are_told(bias, gpu):
    x, target = task(bias)
    gram, cross = grams(ffn(bias), x, target, chunk=20, device="cuda")
    want_gram, want_cross = grams(ffn(bias), x, target, chunk=20)
    assert gram.is_cuda and cross.is_cuda and torch.equal(gram.cpu(), want_gram)
    start = torch.randn(len(want_gram), H)
    before = gpu.on("cpu")
    solved = ridge_solve(gram, cross, start, 1e-3)
    assert not solved.is_cuda and gpu.on("cpu") == before
    assert torch.equal(solved, ridge_solve(want_gram, want_cross, start, 1e-3))
    for limit in (0, 4):
        got, want = (refit(ffn(bias), x, target, limit=limit, device=d) for d in ("cuda", "cpu"))
        assert not got.down.is_cuda
        for a, b in zip(got.parameters(), want.parameters(), strict=True):
            assert torch.equal(a, b)
    kept = eliminate(gram, cross, start.to("cuda"), 4, block=2)
    assert kept.is_cuda
    assert torch.equal(kept.cpu(), eliminate(want_gram, want_cross, start, 4, block=2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rests", ["cpu", "cuda"])
def test_the_local_fit_computes_where_it_is_told_wherever_its_tokens_rest(bias, rests, gpu):
    x, target = task(bias)
    held_out = torch.arange(T) % 5 == 0
    want, as_known = local(ffn(bias), x, target, held_out, steps=5, batch=16)
    before = gpu.on("cpu")
    tokens = [t.to(rests) for t in (x, target, held_out)]
    got, result = local(ffn(bias), *tokens, steps=5, batch=16, device="cuda")
    assert result == as_known and gpu.on("cpu") == before
    for a, b in zip(want.parameters(), got.parameters(), strict=True):
        assert not b.is_cuda and torch.equal(a, b)
    assert relative_error(got.to("cuda"), x, target) == relative_error(got, x, target)


def test_a_full_gpu_leaves_the_work_to_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
    assert device_with_room("cuda:1", 1000) == torch.device("cuda:1")
    assert device_with_room("cuda", 1001) == torch.device("cpu")
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
    assert devices.free_bytes(torch.device("cuda")) > 0
