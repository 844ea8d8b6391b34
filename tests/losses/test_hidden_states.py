"""Each feature loss against loops or by hand in float64, and layer maps."""

import itertools

import pytest
import torch

from moe2dense.errors import UserError
from moe2dense.losses.attention import group_heads, token_attention
from moe2dense.losses.feature_spec import layer_pairs
from moe2dense.losses.hidden_states import HiddenMatch, Tokens, make_projector, token_cosine, token_mse
from moe2dense.losses.relations import rkd_angle, rkd_distance, token_relation

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def test_layer_maps():
    assert layer_pairs("uniform", 4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert layer_pairs("uniform", 3, 12) == [(0, 3), (1, 7), (2, 11)]
    assert layer_pairs("even:4", 32, 48) == [(7, 11), (15, 23), (23, 35), (31, 47)]
    assert layer_pairs("even:4", 3, 12) == layer_pairs("uniform", 3, 12)
    assert layer_pairs("last:2", 3, 12) == [(1, 10), (2, 11)]
    assert layer_pairs("0=1,-1=-2", 3, 12) == [(0, 1), (2, 10)]
    for wrong in ("first", "0=12", "9=0", "last:4", "last:x", "0:1"):
        with pytest.raises(UserError, match="layer map"):
            layer_pairs(wrong, 3, 12)


def test_token_losses_by_hand():
    s, t = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(token_mse(s, t), torch.tensor([2 * (3**0.5 - 1), 2 * (2**0.5 - 1)]))
    torch.testing.assert_close(token_cosine(s, t), torch.tensor([1.0, 0.0]))


def test_the_error_of_a_token_is_its_relative_square_where_that_is_small_and_grows_no_faster_than_the_state_beyond():
    goal = normal(50, 8)
    near = goal * (1 + 1e-4 * normal(50, 8))
    torch.testing.assert_close(
        token_mse(near, goal), (near - goal).square().sum(-1) / goal.square().sum(-1), rtol=1e-6, atol=0
    )
    # a student that writes a massive state where the teacher writes a usual one pulls no harder than a token that is half wrong
    massive, half = (1e3 * goal).requires_grad_(), (1.5 * goal).requires_grad_()
    pulls = [
        torch.autograd.grad(token_mse(own, goal).sum(), own)[0].norm(dim=-1) * goal.norm(dim=-1)
        for own in (massive, half)
    ]
    assert pulls[0].max() <= 2 and pulls[1].min() > 0.8


def test_projectors_start_orthogonal_or_are_nothing():
    assert isinstance(make_projector(8, 8), torch.nn.Identity)
    weight = make_projector(6, 9).weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_match_is_the_mean_over_pairs_of_counted_tokens(kind):
    match = HiddenMatch("0=1,1=3", kind, (2, 6), (4, 9)).double()
    student, teacher = ({f"hidden-{i}": normal(7, d) for i in range(n)} for n, d in ((2, 6), (4, 9)))
    counted = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    student["hidden-0"][2] = float("nan")
    value = match(student, teacher, Tokens(counted.double() / 5, lambda: torch.empty(0)))
    measure = token_mse if kind == "mse" else token_cosine
    parts = [
        measure(match.projectors[i](student[f"hidden-{s}"][counted]), teacher[f"hidden-{t}"][counted]).mean()
        for i, (s, t) in enumerate([(0, 1), (1, 3)])
    ]
    torch.testing.assert_close(value, sum(parts) / 2)
    assert match(student, teacher, Tokens(torch.zeros(7, dtype=DOUBLE), lambda: torch.empty(0))).item() == 0


def test_a_learned_map_finds_the_right_layer():
    match = HiddenMatch("learned", "mse", (1, 5), (3, 5))
    teacher = {f"hidden-{i}": torch.randn(64, 5) for i in range(3)}
    tokens = Tokens(torch.full((64,), 1 / 64), lambda: torch.empty(0))
    optimizer = torch.optim.Adam(match.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        match({"hidden-0": teacher["hidden-1"]}, teacher, tokens).backward()
        optimizer.step()
    assert match.mixture.softmax(-1)[0, 1] > 0.95


def test_attention_of_each_token_against_loops():
    student, teacher = normal(2, 2, 5, 5), normal(2, 6, 5, 5)
    causal = torch.ones(5, 5).tril().bool()
    student, teacher = (x.masked_fill(~causal, -torch.inf).softmax(-1) for x in (student, teacher))
    by_token = [x.transpose(1, 2).flatten(0, 1) for x in (student, teacher)]
    values = token_attention(*by_token).view(2, 5)
    for n, i in itertools.product(range(2), range(5)):
        total = 0.0
        for h in range(2):
            t = teacher[n, 3 * h : 3 * h + 3, i].mean(0)[: i + 1]
            total += (t * (t / student[n, h, i, : i + 1]).log()).sum()
        torch.testing.assert_close(values[n, i], total / 2)
    assert token_attention(by_token[1], by_token[1]).abs().max() < 1e-12
    with pytest.raises(UserError, match="cannot be grouped"):
        group_heads(teacher, 4)


def test_relations_of_each_token_against_loops():
    student, teacher = normal(2, 5, 8).requires_grad_(), normal(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]).bool()
    total, count = torch.zeros((), dtype=DOUBLE), 0
    for n, r, i in itertools.product(range(2), range(4), range(5)):
        if not mask[n, i]:
            continue
        seen = [j for j in range(i + 1) if mask[n, j]]
        s, t = student[n, :, 2 * r : 2 * r + 2], teacher[n, :, 3 * r : 3 * r + 3]
        q, p = (s[seen] @ s[i] / 2**0.5).softmax(-1), (t[seen] @ t[i] / 3**0.5).softmax(-1)
        total = total + (p * (p / q).log()).sum()
        count += 1
    seen = mask[:, None, :].expand(-1, 5, -1).tril()
    mean = (token_relation(student, teacher, 4, seen) * mask).sum() / mask.sum()
    torch.testing.assert_close(mean, total / count)
    for a, b in zip(*(torch.autograd.grad(x, student) for x in (mean, total / count)), strict=True):
        torch.testing.assert_close(a, b)
    assert token_relation(teacher, teacher, 4, seen).abs().max() < 1e-12


def test_rkd_against_loops():
    student, teacher = normal(6, 4), normal(6, 9)

    def huber(a, b):
        d = abs(a - b)
        return 0.5 * d * d if d < 1 else d - 0.5

    pairs = list(itertools.combinations(range(6), 2))
    ds, dt = ([(x[i] - x[j]).norm().item() for i, j in pairs] for x in (student, teacher))
    ms, mt = sum(ds) / 15, sum(dt) / 15
    expected = sum(huber(a / ms, b / mt) for a, b in zip(ds, dt, strict=True)) / 15
    assert rkd_distance(student, teacher).item() == pytest.approx(expected)

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return 0.0 if i in (j, k) else (a @ b / (a.norm() * b.norm())).item()

    triples = list(itertools.product(range(6), repeat=3))
    expected = sum(huber(cosine(student, *t), cosine(teacher, *t)) for t in triples) / len(triples)
    assert rkd_angle(student, teacher).item() == pytest.approx(expected)
    rotation = torch.linalg.qr(normal(9, 9)).Q
    assert rkd_angle(3 * teacher @ rotation, teacher) < 1e-12 and rkd_distance(3 * teacher @ rotation, teacher) < 1e-12
