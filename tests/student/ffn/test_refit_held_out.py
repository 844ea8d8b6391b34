"""Refits choose their ridge on tokens that no fit sees, and errors count by the size of a token's state."""

import math

import pytest
import torch

from moe2dense.student.ffn.dense import DenseFFN, silu_glu
from moe2dense.student.ffn.errors import relative_error, weights_by_size
from moe2dense.student.ffn.refit import FIRST_RIDGE, RIDGES, grams, refit, refit_by_held_out
from moe2dense.student.fit import Fit, fit_at_a_rate_that_helps


def make_ffn(width, hidden=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, hidden, generator=g) for _ in range(2))
    return DenseFFN(gate, up, torch.randn(hidden, width, generator=g) / width, gating=silu_glu)


def data(tokens, width=23, noise=0.0, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 7, generator=g)
    truth = make_ffn(width)
    truth.down = torch.randn(7, width, generator=g)
    target = truth(x) + noise * torch.randn(tokens, 7, generator=g)
    return x, target, torch.arange(tokens) % 5 == 0


def test_held_out_tokens_do_not_enter_the_fit():
    x, target, held_out = data(60)
    changed = target.clone()
    changed[held_out] = 1000.0
    one, other = (refit(make_ffn(23), x[~held_out], t[~held_out], 1e-2) for t in (target, changed))
    assert torch.equal(one.down, other.down)
    for ridge in RIDGES:  # whatever is chosen is one of the fits without them
        result = refit_by_held_out(make_ffn(23), x, changed, held_out)
        if result.ridge == ridge:
            assert torch.equal(result.ffn.down, refit(make_ffn(23), x[~held_out], target[~held_out], ridge).down)


@pytest.mark.parametrize("limit", [0, 9])
def test_the_ridge_is_the_best_of_all_on_held_out_tokens(limit):
    for tokens, noise in ((400, 0.0), (400, 3.0), (30, 1.0), (20, 3.0)):
        x, target, held_out = data(tokens, noise=noise)
        errors = {
            ridge: relative_error(
                refit(make_ffn(23), x[~held_out], target[~held_out], ridge, limit), x[held_out], target[held_out]
            )
            for ridge in RIDGES
        }
        result = refit_by_held_out(make_ffn(23), x, target, held_out, limit=limit)
        assert result.held_out_error <= min(errors[FIRST_RIDGE], *errors.values()) * (1 + 1e-6)


def test_few_tokens_and_noise_take_a_larger_ridge_than_many():
    chosen = [
        refit_by_held_out(make_ffn(23), *data(tokens, noise=noise)).ridge for tokens, noise in ((2000, 0.01), (24, 2.0))
    ]
    assert chosen[0] == RIDGES[0] and (chosen[1] is None or chosen[1] >= 100 * chosen[0])


def test_a_target_of_noise_is_not_fitted():
    """A refit that sees its judges reports a small error here; an honest one reports none below 1."""
    g = torch.Generator().manual_seed(3)
    x, target, held_out = torch.randn(50, 7, generator=g), torch.randn(50, 7, generator=g), torch.arange(50) % 4 == 0
    start = make_ffn(40)
    start.down = torch.zeros(7, 40)
    result = refit_by_held_out(start, x, target, held_out)
    leaking = refit(start, x, target, 1e-3)
    assert relative_error(leaking, x[held_out], target[held_out]) < 0.4
    assert result.held_out_error > 0.9


def test_without_held_out_tokens_all_are_fitted():
    x, target, _ = data(40)
    result = refit_by_held_out(make_ffn(23), x, target, torch.zeros(40, dtype=torch.bool))
    assert result.ridge == FIRST_RIDGE and math.isnan(result.held_out_error)
    assert torch.equal(result.ffn.down, refit(make_ffn(23), x, target, FIRST_RIDGE).down)


def test_weighted_products_and_errors_against_float64():
    x, target, _ = data(37)
    weights = torch.rand(37) + 0.1
    ffn = make_ffn(11)
    gram, cross = grams(ffn, x, target, chunk=10, weights=weights)
    h, w = ffn.hidden(x).double(), weights.double()[:, None]
    torch.testing.assert_close(gram.double(), h.T @ (h * w), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross.double(), h.T @ (target.double() * w), rtol=1e-4, atol=1e-4)
    missed = ((ffn(x).double() - target.double()).pow(2) * w).sum() / (target.double().pow(2) * w).sum()
    assert relative_error(ffn, x, target, weights) == pytest.approx(float(missed), rel=1e-5)


def test_a_token_with_a_huge_state_does_not_take_the_fit_over():
    """Massive activations: one token in 60 is 200 times larger and follows another law."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(240, 7, generator=g)
    target = make_ffn(9, seed=2)(x)
    odd = torch.arange(240) % 60 == 7
    states = torch.randn(240, 7, generator=g) + target
    target[odd], states[odd] = 200 * torch.randn(4, 7, generator=g), 200.0 * torch.randn(4, 7, generator=g)
    weights = weights_by_size(states)
    assert weights.mean() == pytest.approx(1.0, rel=1e-5) and weights[odd].max() < 1e-2
    small, plain = ~odd, refit(make_ffn(9, seed=2), x, target, 1e-3)
    weighed = refit(make_ffn(9, seed=2), x, target, 1e-3, weights=weights)
    assert relative_error(weighed, x[small], target[small]) < 0.2 < relative_error(plain, x[small], target[small])


def test_a_rate_is_quartered_until_a_fit_helps():
    asked = []

    def run(rate):
        asked.append(rate)
        return Fit(1.0, 1.0, 0) if rate > 0.01 else Fit(1.0, 0.5, 7)

    result, rate = fit_at_a_rate_that_helps(run, 0.16)
    assert asked == [0.16, 0.04, 0.01] and rate == 0.01 and result.best_step == 7
    never = []
    result, rate = fit_at_a_rate_that_helps(lambda r: never.append(r) or Fit(1.0, 1.0, 0), 1.0)
    assert never == [1.0, 0.25, 0.0625, 0.015625] and rate == never[-1] and result.best_step == 0
    assert fit_at_a_rate_that_helps(lambda r: Fit(math.nan, math.nan, 0), 0.5)[1] == 0.5
