"""Selection, elimination, refit and the local fit against brute force in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from moe2dense.student.ffn import errors, symmetric
from moe2dense.student.ffn.dense import DenseFFN, concatenate, dense
from moe2dense.student.ffn.energy import output_energy
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.ffn.local import local
from moe2dense.student.ffn.obs import eliminate
from moe2dense.student.ffn.refit import grams, refit
from moe2dense.student.ffn.ridge import ridge_solve
from moe2dense.student.ffn.select import best_neurons, gather
from moe2dense.student.fit import cosine

H, F, E, T = 5, 6, 3, 71


def expert(seed: int, bias: bool = False) -> DenseFFN:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return DenseFFN(draw(F, H), draw(F, H), draw(H, F), *((draw(F), draw(F), draw(H)) if bias else ()))


def data(seed: int, columns: int = H) -> Tensor:
    return torch.randn(T, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_neurons_with_uniform_routing_reproduce_the_block():
    experts = [expert(e) for e in range(E)]
    x = data(9)
    want = sum(f(x) for f in experts) / E
    everything = gather(
        experts, torch.arange(E).repeat_interleave(F), torch.arange(F).repeat(E), torch.full((E,), 1 / E)
    )
    torch.testing.assert_close(everything(x), want)
    torch.testing.assert_close(refit(everything, x, want)(x), want)


@pytest.mark.parametrize("bias", [False, True])
def test_refit_equals_lstsq(bias):
    ffn, x, target = expert(1, bias), data(2), data(3)
    hidden = ffn.hidden(x).numpy()
    if bias:
        hidden = np.concatenate([hidden, np.ones((T, 1))], 1)
    want = hidden @ np.linalg.lstsq(hidden, target.numpy(), rcond=None)[0]
    np.testing.assert_allclose(refit(ffn, x, target, ridge=1e-13)(x).numpy(), want, atol=1e-8)


def test_ridge_is_towards_the_start():
    hidden, target, start = data(4, F), data(5), data(6)[:F]
    ridge = 0.3
    strength = ridge * float((hidden.T @ hidden).diagonal().mean())
    stacked = np.concatenate([hidden.numpy(), np.sqrt(strength) * np.eye(F)])
    wanted = np.linalg.lstsq(stacked, np.concatenate([target.numpy(), np.sqrt(strength) * start.numpy()]), rcond=None)[
        0
    ]
    got = ridge_solve(hidden.T @ hidden, hidden.T @ target, start, ridge)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-10)
    hidden[:, 2] = 0  # a neuron that the data never lights up keeps its output weights
    kept = ridge_solve(hidden.T @ hidden, hidden.T @ target, start, ridge)
    torch.testing.assert_close(kept[2], start[2])


def test_grams_sum_over_chunks():
    ffn, x, target = expert(7, bias=True), data(8), data(9)
    hidden = torch.cat([ffn.hidden(x), torch.ones(T, 1, dtype=torch.float64)], 1)
    gram, cross = grams(ffn, x, target, chunk=13)
    torch.testing.assert_close(gram, hidden.T @ hidden)
    torch.testing.assert_close(cross, hidden.T @ target)


def _loss(hidden: Tensor, target: Tensor, start: Tensor, strength: float, keep: list[int]) -> float:
    """The least ridge loss with every neuron outside `keep` forced to write zero."""
    rows = hidden[:, keep].numpy()
    stacked = np.concatenate([rows, np.sqrt(strength) * np.eye(len(keep))])
    right = np.concatenate([target.numpy(), np.sqrt(strength) * start[keep].numpy()])
    w = np.linalg.lstsq(stacked, right, rcond=None)[0]
    dropped = strength * float(np.delete(start.numpy(), keep, 0).__pow__(2).sum())
    return float(((stacked @ w - right) ** 2).sum()) + dropped


@pytest.mark.parametrize("seed", range(3))
def test_elimination_is_the_exact_greedy_order(seed):
    p = 14
    hidden, target, start = data(seed, p), data(seed + 10), data(seed + 20)[:p]
    hidden[:, 3] = hidden[:, 4] + 1e-3 * hidden[:, 5]  # a redundant neuron
    gram, cross, ridge = hidden.T @ hidden, hidden.T @ target, 1e-2
    strength = ridge * float(gram.diagonal().mean())
    left = list(range(p))
    for width in range(p - 1, 3, -1):
        left = min(
            (sorted(set(left) - {i}) for i in left), key=lambda keep: _loss(hidden, target, start, strength, keep)
        )
        assert eliminate(gram, cross, start, width, ridge).tolist() == left


def test_elimination_in_blocks_stays_close_to_the_greedy_one():
    p = 40
    hidden, target, start = data(1, p), data(2), torch.zeros(p, H, dtype=torch.float64)
    gram, cross = hidden.T @ hidden, hidden.T @ target
    strength = 1e-2 * float(gram.diagonal().mean())
    one, many = (eliminate(gram, cross, start, 20, 1e-2, block=b).tolist() for b in (1, 4))
    chance = np.mean([_loss(hidden, target, start, strength, sorted(np.random.default_rng(i).permutation(p)[:20].tolist())) for i in range(20)])  # fmt: skip
    greedy, blocked = (_loss(hidden, target, start, strength, keep) for keep in (one, many))
    assert greedy <= blocked * 1.0000001 < 0.9 * chance and len(many) == 20


def _eliminate_plainly(gram: Tensor, cross: Tensor, start: Tensor, width: int, ridge: float, block: int) -> list[int]:
    """The same elimination with everything computed anew at every step."""
    strength = ridge * gram.diagonal().mean()
    left = torch.arange(len(gram))
    while len(left) > width:
        inverse = (gram[left][:, left] + strength * torch.eye(len(left), dtype=gram.dtype)).inverse()
        weights = inverse @ (cross[left] + strength * start[left])
        score = weights.pow(2).sum(1) / inverse.diagonal()
        keep = score.argsort()[min(block, len(left) - width) :].sort().values
        left = left[keep]
    return left.tolist()


@pytest.mark.parametrize(("block", "width"), [(1, 20), (5, 20), (7, 123), (40, 30)])
def test_elimination_with_waiting_downdates_is_the_plain_one(block, width):
    """230 neurons: more downdates than may wait, and what is left is stored anew several times."""
    p = 230
    hidden, target, start = data(1, p) * torch.linspace(0.1, 2, p), data(2), data(3, p)[:H].T.contiguous()
    gram, cross = hidden.T @ hidden, hidden.T @ target
    want = _eliminate_plainly(gram, cross, start, width, 1e-2, block)
    kept = [t.clone() for t in (gram, cross)]
    assert eliminate(gram, cross, start, width, 1e-2, block).tolist() == want
    assert torch.equal(gram, kept[0]) and torch.equal(cross, kept[1])
    assert eliminate(*kept, start, width, 1e-2, block, overwrite=True).tolist() == want


def test_errors_of_many_tokens_are_added_up_in_pieces(monkeypatch):
    ffn, x, target = expert(3, bias=True), data(4), data(5)
    weights = data(6, 1)[:, 0].abs()
    missed = (ffn(x) - target).pow(2).sum(1)
    for w, given in ((weights, weights), (torch.ones(T, dtype=torch.float64), None)):
        want = float((missed * w).sum() / (target.pow(2).sum(1) * w).sum())
        for rows in (1, 7, 70, 8192):
            monkeypatch.setattr(errors, "rows_at_once", lambda width, rows=rows: rows)
            assert relative_error(ffn, x, target, given) == pytest.approx(want, rel=1e-6)


def test_symmetric_products_panel_by_panel(monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL", 5)
    left, total = data(1, 13)[:9].T, data(2, 13)[:13]
    total = total + total.T
    want = total - 0.5 * left @ left.T
    torch.testing.assert_close(symmetric.add_product(total.clone(), left, left.T, -0.5), want)
    below = symmetric.add_product(total.clone(), left, left.T, -0.5, lower=True)
    torch.testing.assert_close(below.tril(), want.tril())
    torch.testing.assert_close(symmetric.mirror(below), want)


@pytest.mark.parametrize("bias", [False, True])
def test_refit_of_groups_nears_the_whole_one(bias):
    """Groups of neurons are fitted in turn where one Gram matrix of all would be too large: never worse, and in the end the same."""
    ffn, x = concatenate([expert(e, bias) for e in range(4)]), torch.cat([data(5), data(6), data(7)])
    target = concatenate([expert(e, bias) for e in range(8, 12)])(x) + 1
    whole = relative_error(refit(ffn, x, target, 1e-9), x, target)
    errors = [relative_error(refit(ffn, x, target, 1e-9, limit=7, sweeps=n), x, target) for n in (0, 1, 2, 50)]
    assert errors[0] == relative_error(ffn, x, target) > errors[1] > errors[2] > errors[3] > whole * (1 - 1e-9)
    assert errors[3] < 1.02 * whole and errors[2] < 0.5 * errors[0]
    same = refit(ffn, x, target, limit=24)
    assert torch.equal(same.down, refit(ffn, x, target).down)


def test_selection_by_energy_is_the_brute_force_ranking():
    experts = [expert(e, bias=True) for e in range(E)]
    g = torch.Generator().manual_seed(0)
    x, routed = data(11), torch.rand(T, E, generator=g, dtype=torch.float64)
    routed[routed < 0.5] = 0
    routed[:, 1] = 0  # an expert no token reaches
    scores = []
    for e, f in enumerate(experts):
        rows = torch.nonzero(routed[:, e]).flatten()
        scores.append(output_energy((f.hidden(x[rows]) * routed[rows, e, None]).pow(2).sum(0), f.down))
    brute = {
        (e, j): float(
            sum((routed[t, e] * f.hidden(x[t : t + 1])[0, j]) ** 2 for t in range(T)) * f.down[:, j].pow(2).sum()
        )
        for e, f in enumerate(experts)
        for j in range(F)
    }
    want = sorted(sorted(brute, key=brute.__getitem__, reverse=True)[:8])
    source, neuron = best_neurons(scores, 8)
    assert list(zip(source.tolist(), neuron.tolist(), strict=True)) == want and 1 not in source.tolist()
    alpha = routed.mean(0)
    got = gather(experts, source, neuron, alpha)(x)
    parts = [alpha[e] * dense(experts[e], rows=neuron[source == e])(x) for e in (0, 2)]
    torch.testing.assert_close(got, sum(parts))


def test_concatenation_adds_outputs():
    a, b, x = expert(1, bias=True), expert(2, bias=True), data(3)
    torch.testing.assert_close(concatenate([dense(a, 0.5), dense(b, 2.0)])(x), 0.5 * a(x) + 2 * b(x))


def test_local_fit_lowers_the_held_out_error_and_never_raises_it():
    teacher, x = expert(1), data(2)
    noise = 0.1 * data(3, F)[:, :H]
    start = dense(teacher)
    start.gate += 0.3 * torch.randn(F, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    held_out = torch.arange(T) % 5 == 0
    target = teacher(x) + noise
    fitted, result = local(start, x, target, held_out, steps=120, lr=2e-2, batch=16)
    assert relative_error(fitted, x[held_out], target[held_out]) == pytest.approx(result.after)
    assert (
        result.after < 0.7 * result.before == pytest.approx(0.7 * relative_error(start, x[held_out], target[held_out]))
    )
    assert not fitted.gate.requires_grad and start.gate is not fitted.gate
    worse, result = local(start, x, target, held_out, steps=12, lr=1e6, batch=16)  # diverges: the start is kept
    assert result.best_step == 0 and torch.equal(worse.down, start.down)


def test_cosine_warms_up_and_ends_at_zero():
    values = [cosine(s, 100, 0.1) for s in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1 and values[-1] < 0.01
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
