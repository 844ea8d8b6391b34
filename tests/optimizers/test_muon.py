"""Muon on a CPU: against singular values in float64, and against torch's own, which rounds to bfloat16."""

import pytest
import torch

from moe2dense.optimizers.muon import Muon, nearly_orthogonal
from tests.flop_counting import counted

A, B, C = COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def by_singular_values(matrix, steps, eps):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=eps)
    for _ in range(steps):
        s = A * s + B * s**3 + C * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(7, 7), (5, 31), (31, 5), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_singular_values_follow_the_polynomial(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    exact = by_singular_values(matrix, steps, 1e-7)
    torch.testing.assert_close(nearly_orthogonal(matrix.double(), COEFFICIENTS, steps, 1e-7), exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(nearly_orthogonal(matrix, COEFFICIENTS, steps, 1e-7).double(), exact, atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays():
    assert torch.equal(nearly_orthogonal(torch.zeros(3, 4), COEFFICIENTS, 5, 1e-7), torch.zeros(3, 4))


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_torchs_to_the_digits_of_bfloat16(nesterov):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (20, 12), (6, 6)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    idle = torch.nn.Parameter(torch.ones(3, 3))  # has no gradient
    options = dict(lr=0.1, weight_decay=0.2, nesterov=nesterov)
    optimizers = Muon([*ours, idle], **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(idle, torch.ones(3, 3))
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert (a - b).norm() < 0.01 * moved
        assert moved > 0.1
        buffers = [optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (a, b), strict=True)]
        torch.testing.assert_close(*buffers)


def test_a_step_multiplies_nothing_in_bfloat16():
    matrix = torch.nn.Parameter(torch.randn(4, 6))
    matrix.grad = torch.randn(4, 6)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(x.dtype for x in (*args, result) if isinstance(x, torch.Tensor))
            return result

    with Watch():
        Muon([matrix], lr=1e-3).step()
    assert set(seen) == {torch.float32}
    assert len(seen) > 20


def test_a_step_costs_what_torch_counts():
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in [(40, 12), (12, 40), (24, 24)]]
    idle = torch.nn.Parameter(torch.ones(50, 50))  # has no gradient
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    with counted() as flops:
        Muon([*matrices, idle], lr=1e-3).step()
    assert flops.ours == flops.torch > 0


def test_a_closure_gives_the_loss():
    matrix = torch.nn.Parameter(torch.ones(2, 3))

    def closure():
        loss = matrix.sum()
        loss.backward()
        return float(loss.detach())

    assert Muon([matrix], lr=1e-3).step(closure) == 6.0
    assert not torch.equal(matrix, torch.ones(2, 3))
