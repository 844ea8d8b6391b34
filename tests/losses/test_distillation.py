"""The tiled objective against autograd through full logits."""

import pytest
import torch
from torch.nn import functional as F

from moe2dense.errors import UserError
from moe2dense.losses import tiled
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import HiddenRows, LogitRows, SampledRows, TopKRows
from moe2dense.modeling.head import Head, logit_rules

DOUBLE = torch.float64


def make(n=29, hidden=13, teacher_hidden=17, vocabulary=101, dtype=DOUBLE, seed=0, **rules):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=DOUBLE).to(dtype)

    student = Head(normal(vocabulary, hidden).requires_grad_(), normal(vocabulary).requires_grad_(), **rules)
    teacher = Head(normal(vocabulary, teacher_hidden), normal(vocabulary), **rules)
    return normal(n, hidden).requires_grad_(), student, HiddenRows(normal(n, teacher_hidden), teacher), g


def reference(hidden, head, rows, labels, mask, weights, temperature, alpha):
    """Plain autograd of the formula, on full matrices."""
    raw = F.linear(hidden, head.weight, head.bias) * head.scale
    logits = head.softcap * torch.tanh(raw / head.softcap) if head.softcap else raw
    p = (rows.head.logits(rows.hidden) / temperature).softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1) * temperature**2
    kd = (kl * weights)[mask].sum() / weights[mask].sum()
    ce = F.cross_entropy(logits[mask], labels[mask], ignore_index=-100)
    return (1 - alpha) * kd + alpha * ce


@pytest.mark.parametrize("rules", [{}, {"scale": 0.125}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0}])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.5, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("tile_bytes", [1, 7 * 101 * 8, 2**26])
def test_objective_and_gradients_match_full_autograd(rules, temperature, alpha, tile_bytes):
    hidden, head, rows, g = make(**rules)
    mask = torch.rand(29, generator=g) > 0.3
    labels = torch.randint(0, 101, (29,), generator=g).where(torch.rand(29, generator=g) > 0.2, torch.tensor(-100))
    weights = torch.rand(29, generator=g, dtype=DOUBLE)
    inputs = (hidden, head.weight, head.bias)
    expected = reference(hidden, head, rows, labels, mask, weights, temperature, alpha)
    expected_grads = torch.autograd.grad(3 * expected, inputs)
    result = distillation_loss(
        hidden, head, rows, labels=labels, mask=mask, weights=weights,
        temperature=temperature, alpha=alpha, tile_bytes=tile_bytes,
    )  # fmt: skip
    torch.testing.assert_close(result.total, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * result.total, inputs), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd:0.3", "skew_forward_kl", "tvd"])
def test_tiles_in_float32_equal_one_piece(loss):
    results = []
    for tile_bytes in (1, 3 * 1009 * 4, 2**28):
        hidden, head, rows, _ = make(n=57, vocabulary=1009, dtype=torch.float32, seed=1)
        result = distillation_loss(hidden, head, rows, loss=loss, tile_bytes=tile_bytes)
        results.append((result.total.detach(), *torch.autograd.grad(result.total, (hidden, head.weight, head.bias))))
    for other in results[:-1]:
        for a, b in zip(other, results[-1], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("kind", ["hidden", "logits", "top-k", "sampled"])
@pytest.mark.parametrize("rows_at_once", [1, 4, 11])
def test_a_tile_is_worked_on_in_parts_that_add_up(monkeypatch, kind, rows_at_once):
    """A few rows at a time are turned into gradients, so that they stay in a CPU's cache: every part meets its own rows."""
    hidden, head, rows, g = make(softcap=4.0, scale=0.5)
    log_p = rows.head.logits(rows.hidden).log_softmax(-1).detach()
    top = log_p.topk(7)
    teacher = {
        "hidden": rows, "logits": LogitRows(log_p), "top-k": TopKRows(top.indices, top.values),
        "sampled": SampledRows(top.indices, torch.rand(29, 7, generator=g, dtype=DOUBLE), torch.zeros(29, dtype=DOUBLE)),
    }[kind]  # fmt: skip
    options = dict(
        labels=torch.randint(0, 101, (29,), generator=g), weights=torch.rand(29, generator=g, dtype=DOUBLE),
        watch=torch.rand(29, generator=g) > 0.5, alpha=0.3,
    )  # fmt: skip
    inputs, results = (hidden, head.weight, head.bias), []
    for cache_bytes in (2**30, rows_at_once * 101 * 8):
        monkeypatch.setattr(tiled, "CACHE_BYTES", cache_bytes)
        loss = distillation_loss(hidden, head, teacher, **options)
        parts = loss.total.detach(), loss.kd, loss.ce, loss.watched
        results.append([*parts, *torch.autograd.grad(loss.total, inputs)])
    for whole, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n, most", [(10, 4), (12, 4), (3, 100), (1, 1), (7, 1)])
def test_slices_are_few_and_nearly_equal(n, most):
    sizes = [s.stop - s.start for s in tiled._slices(n, most)]
    assert sum(sizes) == n and max(sizes) <= most and len(sizes) == -(-n // most)
    assert [s.start for s in tiled._slices(n, most)] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize(("ours", "theirs"), [(101, 90), (90, 101)])
def test_padded_vocabularies_meet_on_the_ids_both_know(ours, theirs):
    hidden, head, rows, _ = make()
    student = Head(head.weight.detach()[:ours].clone().requires_grad_(), None)
    teacher = HiddenRows(rows.hidden, Head(rows.head.weight[:theirs]))
    p = teacher.head.logits(rows.hidden)[:, :90].softmax(-1)
    expected = (p * (p.log() - student.logits(hidden)[:, :90].log_softmax(-1))).sum(-1).mean()
    result = distillation_loss(hidden, student, teacher).total
    torch.testing.assert_close(result, expected)
    grads = [torch.autograd.grad(x, (hidden, student.weight)) for x in (result, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_on_both_sides_equal_hidden_states():
    hidden, head, rows, _ = make()
    direct = distillation_loss(hidden, head, rows, temperature=2.0)
    logits = head.logits(hidden)
    from_logits = distillation_loss(
        logits, None, LogitRows(rows.head.logits(rows.hidden)), temperature=2.0, tile_bytes=999
    )
    torch.testing.assert_close(direct.total, from_logits.total)
    for a, b in zip(*(torch.autograd.grad(x.total, (hidden, head.weight)) for x in (direct, from_logits)), strict=True):
        torch.testing.assert_close(a, b)


def test_parts_of_a_batch_add_up_to_the_whole():
    hidden, head, rows, g = make()
    labels = torch.randint(0, 101, (29,), generator=g)
    labels[::4] = -100
    whole = distillation_loss(hidden, head, rows, labels=labels, alpha=0.4)
    expected = torch.autograd.grad(whole.total, head.weight)[0]
    total, grad = torch.zeros((), dtype=DOUBLE), torch.zeros_like(expected)
    for part in torch.arange(29).split([3, 20, 6]):
        loss = distillation_loss(
            hidden[part], head, rows.select(part), labels=labels[part], alpha=0.4,
            denominator=29, label_denominator=float((labels >= 0).sum()),
        )  # fmt: skip
        total = total + loss.total.detach()
        grad += torch.autograd.grad(loss.total, head.weight)[0]
    torch.testing.assert_close(total, whole.total.detach())
    torch.testing.assert_close(grad, expected)


def test_a_fully_masked_batch_is_zero_with_zero_gradient():
    hidden, head, rows, _ = make()
    poisoned = HiddenRows(torch.full_like(rows.hidden, float("nan")), rows.head)
    loss = distillation_loss(
        hidden, head, poisoned, mask=torch.zeros(29, dtype=torch.bool), labels=torch.full((29,), -100), alpha=0.5
    )
    loss.total.backward()
    assert loss.total.item() == 0 and all(not x.grad.any() for x in (hidden, head.weight, head.bias))


def test_frozen_head_and_impossible_teacher_tokens():
    hidden, head, rows, _ = make()
    logits = rows.head.logits(rows.hidden)
    logits[:, 5] = -float("inf")
    frozen = Head(head.weight.detach(), None)
    loss = distillation_loss(hidden, frozen, LogitRows(logits))
    loss.total.backward()
    p, q = logits.softmax(-1), frozen.logits(hidden.detach()).softmax(-1)
    torch.testing.assert_close(loss.total.detach(), (torch.special.xlogy(p, p) - p * q.log()).sum(-1).mean())
    torch.testing.assert_close(hidden.grad, (q - p) @ frozen.weight / 29)
    with pytest.raises(RuntimeError, match="handed out"):
        loss.total.backward()


def coarse_kl(ids, p, q):
    """KL of the distributions over k tokens and the rest."""
    p_k, q_k = p.gather(1, ids), q.gather(1, ids)
    p_rest, q_rest = 1 - p_k.sum(-1), 1 - q_k.sum(-1)
    return ((p_k * (p_k.log() - q_k.log())).sum(-1) + p_rest * (p_rest.log() - q_rest.log())).mean()


def test_top_k_with_tail_is_the_coarse_kl():
    hidden, head, rows, _ = make()
    p = rows.head.logits(rows.hidden).softmax(-1)
    top = p.topk(7)
    result = distillation_loss(hidden, head, TopKRows(top.indices, top.values.log()))
    expected = coarse_kl(top.indices, p, head.logits(hidden).softmax(-1))
    torch.testing.assert_close(result.total, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, head.weight)) for x in (result.total, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_top_k_without_tail_is_renormalised():
    hidden, head, rows, _ = make()
    top = rows.head.logits(rows.hidden).softmax(-1).topk(7)
    p = top.values / top.values.sum(-1, keepdim=True)
    result = distillation_loss(hidden, head, TopKRows(top.indices, top.values.log(), tail=False))
    expected = (p * (p.log() - head.logits(hidden).log_softmax(-1).gather(1, top.indices))).sum(-1).mean()
    torch.testing.assert_close(result.total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (result.total, expected)))


def test_whole_vocabulary_as_top_k_is_the_full_kl():
    hidden, head, rows, _ = make(vocabulary=11)
    log_p = rows.head.logits(rows.hidden).log_softmax(-1)
    ids = torch.arange(11).expand(29, 11)
    full = distillation_loss(hidden, head, rows)
    top = distillation_loss(hidden, head, TopKRows(ids, log_p))
    torch.testing.assert_close(top.total, full.total)
    torch.testing.assert_close(*(torch.autograd.grad(x.total, hidden)[0] for x in (top, full)))


def draw(p, draws, g):
    ids = torch.multinomial(p, draws, replacement=True, generator=g)
    return SampledRows(ids, torch.full(ids.shape, 1 / draws, dtype=p.dtype), -(p * p.log()).sum(-1))


def test_sampled_gradient_is_unbiased_and_top_k_is_not():
    hidden, head, rows, g = make(n=6, vocabulary=41)
    p = rows.head.logits(rows.hidden).softmax(-1)
    full = torch.autograd.grad(distillation_loss(hidden, head, rows).total, hidden)[0].flatten()

    def gradient(teacher):
        return torch.autograd.grad(distillation_loss(hidden, head, teacher).total, hidden)[0].flatten()

    draws = torch.stack([gradient(draw(p, 12, g)) for _ in range(1000)])
    error = (draws.mean(0) - full).abs() / (draws.std(0) / 1000**0.5 + 1e-15)
    assert error.max() < 4.5 and error.square().mean() < 1.8  # standard errors
    top = p.topk(3)
    biased = gradient(TopKRows(top.indices, top.values.log(), tail=False))
    assert ((biased - full).abs() / (draws.std(0) / 1000**0.5)).max() > 10


def test_sampled_value_is_unbiased_and_weights_may_be_merged():
    hidden, head, rows, g = make(n=6, vocabulary=41)
    p = rows.head.logits(rows.hidden).softmax(-1)
    full = distillation_loss(hidden, head, rows).total.item()
    values = torch.tensor([distillation_loss(hidden, head, draw(p, 12, g)).total.item() for _ in range(1000)])
    assert abs(values.mean() - full) < 4 * values.std() / 1000**0.5
    one = SampledRows(torch.tensor([[4, 4, 9]]), torch.tensor([[0.25, 0.25, 0.5]]), torch.zeros(1))
    two = SampledRows(torch.tensor([[4, 9, 0]]), torch.tensor([[0.5, 0.5, 0.0]]), torch.zeros(1))
    pair = [torch.autograd.grad(distillation_loss(hidden[:1], head, x).total, hidden)[0] for x in (one, two)]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize(
    ("loss", "temperature", "message"), [("reverse_kl", 1.0, "forward_kl only"), ("forward_kl", 2.0, "written at")]
)
def test_sparse_rows_refuse_what_they_cannot_serve(loss, temperature, message):
    hidden, head, rows, g = make(n=3)
    p = rows.head.logits(rows.hidden).softmax(-1)
    top = p.topk(4)
    for teacher in (TopKRows(top.indices, top.values.log()), draw(p, 5, g)):
        with pytest.raises(UserError, match=message):
            distillation_loss(hidden, head, teacher, loss=loss, temperature=temperature)


def test_missing_parts_are_refused():
    hidden, head, rows, _ = make()
    with pytest.raises(UserError, match="labels"):
        distillation_loss(hidden, head, rows, alpha=0.5)
    with pytest.raises(UserError, match="teacher"):
        distillation_loss(hidden, head, None, labels=torch.zeros(29, dtype=torch.int64), alpha=0.5)
    with pytest.raises(UserError, match="temperature"):
        distillation_loss(hidden, head, rows, temperature=0.0)


def test_temperature_squared_keeps_the_gradient_scale():
    """For T -> infinity, T^2 KL -> half the variance of the logits' difference, whatever T."""
    hidden, head, rows, _ = make()
    difference = (rows.head.logits(rows.hidden) - head.logits(hidden)).detach()
    limit = difference.var(-1, unbiased=False).mean() / 2
    result = distillation_loss(hidden, head, rows, temperature=1e4).total
    assert result.item() == pytest.approx(limit.item(), rel=1e-2)


def test_logit_rules_of_configs():
    from types import SimpleNamespace

    assert logit_rules(SimpleNamespace(logits_scaling=8.0)) == (0.125, None)
    assert logit_rules(SimpleNamespace(logit_scale=0.25)) == (0.25, None)
    assert logit_rules(SimpleNamespace(final_logit_softcapping=30.0)) == (1.0, 30.0)
    assert logit_rules(SimpleNamespace(final_logit_softcapping=None)) == (1.0, None)
