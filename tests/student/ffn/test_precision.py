"""Where products and solutions may be less exact than float64, on layers whose Gram matrices are badly conditioned."""

import pytest
import torch

from moe2dense.student.ffn import refit as refit_module
from moe2dense.student.ffn import ridge as ridge_module
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.kernel import KernelProblem
from moe2dense.student.ffn.obs import eliminate, eliminate_by_tokens
from moe2dense.student.ffn.refit import grams, refit, refit_by_held_out
from moe2dense.student.ffn.ridge import RidgeProblem, ridge_solve, summed_product

T, M, H = 700, 180, 24


def layer(falls: float, seed: int = 0, tokens: int = T, neurons: int = M):
    """Activations [T, M] whose spectrum falls by `falls` decades, with a few neurons much larger than the rest, and targets [T, H]."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, neurons, generator=g, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(neurons, neurons, generator=g, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, -falls, neurons, dtype=torch.float64)
    hidden = base * spectrum @ mix
    hidden[:, ::31] *= 30.0
    target = hidden @ torch.randn(neurons, H, generator=g, dtype=torch.float64) + 0.1 * torch.randn(
        tokens, H, generator=g, dtype=torch.float64
    )
    return hidden, target, torch.randn(neurons, H, generator=g, dtype=torch.float64)


def objective(hidden, target, start, weights, ridge):
    """What a ridge regression minimises, in float64."""
    strength = ridge * hidden.pow(2).sum(0).mean()
    return float((target - hidden @ weights).pow(2).sum() + strength * (weights - start).pow(2).sum())


@pytest.mark.parametrize("falls", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_refined_solutions_minimise_what_float64_minimises(falls, ridge):
    """From a Gram matrix in float32, which is what a build has."""
    hidden, target, start = layer(falls)
    exact = ridge_solve(hidden.T @ hidden, hidden.T @ target, start, ridge)
    single = hidden.float()
    got = RidgeProblem(single.T @ single, single.T @ target.float(), start.float()).solve(ridge).double()
    best = objective(hidden, target, start, exact, ridge)
    assert objective(hidden, target, start, got, ridge) <= best * (1 + 1e-5)


def test_what_float32_cannot_hold_is_solved_in_float64(monkeypatch):
    """A Gram matrix without full rank: a ridge that rounding swallows leaves nothing to refine."""
    hidden = layer(0.0)[0][:, :5].float() @ torch.randn(5, M)
    gram, cross, start = hidden.T @ hidden, hidden.T @ torch.randn(T, H), torch.randn(M, H)
    problem = RidgeProblem(gram, cross, start)
    assert problem._refined(float(1e-12 * problem.scale)) is None
    monkeypatch.setattr(problem, "_refined", lambda *_: None)
    assert torch.equal(problem.solve(1e-4), ridge_module._solve_double(gram, cross, start, 1e-4))


def test_sums_of_blocks_are_nearer_than_float32():
    left, right = (torch.randn(shape, dtype=torch.float64) + 3 for shape in ((40, 5000), (5000, 30)))
    exact = left.float().double() @ right.float().double()
    ours, plain = summed_product(left.float(), right.float()), (left.float() @ right.float()).double()
    assert float((ours - exact).norm()) < 0.7 * float((plain - exact).norm())


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to the ten bits of a float's fraction that TF32 keeps."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("falls", [1.0, 3.0, 6.0])
def test_activations_in_tf32_cost_less_than_the_least_ridge(falls):
    """Their rounding acts as a ridge of 2^-22 of each neuron's energy, far below the least that is tried (1e-4)."""
    hidden, target, start = layer(falls)
    rounded = tf32(hidden).double()
    for ridge in (1e-4, 1e-2):
        exact, got = (ridge_solve(h.T @ h, h.T @ target, start, ridge) for h in (hidden, rounded))
        best = objective(hidden, target, start, exact, ridge)
        assert objective(hidden, target, start, got, ridge) <= best * (1 + 1e-3)


def test_gram_matrices_in_tf32_would_not_do():
    """Why products of Gram matrices stay in float32: in TF32 small directions are lost, and the fit with them."""
    hidden, target, start = layer(6.0)
    rounded = tf32(hidden.T @ hidden).double()
    exact = ridge_solve(hidden.T @ hidden, hidden.T @ target, start, 1e-4)
    eigenvalues = torch.linalg.eigvalsh(rounded + 1e-4 * rounded.diagonal().mean() * torch.eye(M))
    if eigenvalues.min() > 0:
        got = ridge_solve(rounded, hidden.T @ target, start, 1e-4)
        assert objective(hidden, target, start, got, 1e-4) > objective(hidden, target, start, exact, 1e-4) * (1 + 1e-4)


@pytest.mark.parametrize("ridge", [1e-1, 1e-3])
@pytest.mark.parametrize("block", [1, 7])
def test_eliminating_by_tokens_is_eliminating(ridge, block):
    hidden, target, start = layer(1.0, tokens=90)
    want = eliminate(hidden.T @ hidden, hidden.T @ target, start, 60, ridge, block)
    assert torch.equal(eliminate_by_tokens(hidden, target, start, 60, ridge, block), want)
    single = eliminate_by_tokens(*(t.float() for t in (hidden, target, start)), 60, ridge, block)
    assert len(set(single.tolist()) & set(want.tolist())) >= 58  # near ties may fall either way


@pytest.mark.parametrize("falls", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_few_tokens_are_fitted_as_least_squares_fit_them(falls, ridge):
    """By matrices of tokens, against float64's lstsq on the rows of ridge and fit; from activations in float32."""
    hidden, target, start = layer(falls, tokens=97)
    strength = ridge * hidden.pow(2).sum(0).mean()
    rows = torch.cat([hidden, strength.sqrt() * torch.eye(M, dtype=torch.float64)])
    exact = torch.linalg.lstsq(rows, torch.cat([target, strength.sqrt() * start])).solution
    problem = KernelProblem(*(t.float() for t in (hidden, target, start)))
    best = objective(hidden, target, start, exact, ridge)
    assert objective(hidden, target, start, problem.solve(ridge).double(), ridge) <= best * (1 + 1e-5)
    other, wanted, _ = layer(falls, seed=1, tokens=31)
    error = float((wanted - other @ exact).pow(2).sum() / wanted.pow(2).sum())
    assert problem.judge(other.float(), wanted.float()).error(ridge) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_a_refit_of_few_tokens_is_the_refit(bias, monkeypatch):
    """The same ridge, weights and error, with weights by token and an output bias too."""
    g = torch.Generator().manual_seed(3)
    gate, up, down = (torch.randn(shape, generator=g) / 6 for shape in ((M, 40), (M, 40), (40, M)))
    ffn = DenseFFN(gate, up, down, None, None, torch.randn(40, generator=g) if bias else None)
    x = torch.randn(110, 40, generator=g)
    target = DenseFFN(gate, up, 2 * down)(x) + torch.randn(110, 40, generator=g)
    held_out, weights = torch.arange(110) % 4 == 0, torch.rand(110, generator=g) + 0.1
    want = [
        refit_by_held_out(ffn, x, target, held_out, weights=weights).ffn,
        refit(ffn, x, target, 1e-2, weights=weights),
    ]
    chosen = refit_by_held_out(ffn, x, target, held_out, weights=weights)
    monkeypatch.setattr(refit_module, "EXACT_WIDTH", 10)
    got = refit_by_held_out(ffn, x, target, held_out, weights=weights)
    assert got.ridge == chosen.ridge and got.held_out_error == pytest.approx(chosen.held_out_error, rel=1e-4)
    for ours, other in zip([got.ffn, refit(ffn, x, target, 1e-2, weights=weights)], want, strict=True):
        for mine, its in zip(ours.parameters(), other.parameters(), strict=True):
            assert float((mine - its).norm()) < 1e-3 * float(its.norm())


def test_a_wide_refit_chooses_the_ridge_that_all_outputs_choose(monkeypatch):
    """By a sketch of the outputs, solved in float32; and ends where float64 ends."""
    g = torch.Generator().manual_seed(2)
    gate, up, down = (torch.randn(shape, generator=g) / 6 for shape in ((M, 40), (M, 40), (40, M)))
    x = torch.randn(500, 40, generator=g)
    for noise in (0.01, 3.0):
        ffn = DenseFFN(gate, up, down)
        target = DenseFFN(gate, up, 2 * down)(x) + noise * torch.randn(500, 40, generator=g)
        held_out = torch.arange(500) % 4 == 0
        want = refit_by_held_out(ffn, x, target, held_out)
        monkeypatch.setattr(refit_module, "EXACT_WIDTH", 10)
        monkeypatch.setattr(ridge_module, "EXACT_WIDTH", 10)
        monkeypatch.setattr(refit_module, "SKETCH", 16)
        got = refit_by_held_out(ffn, x, target, held_out)
        monkeypatch.undo()
        assert got.ridge == want.ridge and got.held_out_error == pytest.approx(want.held_out_error, rel=1e-3)
        assert float((got.ffn.down - want.ffn.down).norm()) < 1e-3 * float(want.ffn.down.norm())


def test_a_wide_refit_with_an_output_bias(monkeypatch):
    g = torch.Generator().manual_seed(4)
    shapes = [(M, 40), (M, 40), (40, M), (M,), (M,), (40,)]
    ffn = DenseFFN(*(torch.randn(shape, generator=g) / 6 for shape in shapes))  # type: ignore[arg-type]
    x = torch.randn(400, 40, generator=g)
    target, held_out = ffn(x) * 1.5 + 1, torch.arange(400) % 4 == 0
    gram, cross = grams(ffn, x[~held_out], target[~held_out])
    assert len(gram) == M + 1 and len(cross) == M + 1
    want = refit_by_held_out(ffn, x, target, held_out, weights=x.pow(2).sum(1))
    for module in (refit_module, ridge_module):
        monkeypatch.setattr(module, "EXACT_WIDTH", 10)
    monkeypatch.setattr(refit_module, "SKETCH", 16)
    got = refit_by_held_out(ffn, x, target, held_out, weights=x.pow(2).sum(1))
    assert got.ffn.down_bias is not None and got.held_out_error == pytest.approx(
        want.held_out_error, rel=0.02, abs=1e-5
    )
