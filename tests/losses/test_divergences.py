"""Every divergence against float64 autograd of its textbook formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from moe2dense.errors import UserError
from moe2dense.losses.divergences import cross_entropy, divergence


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


TEXTBOOK = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "symmetric_kl": lambda p, q: (kl(p, q) + kl(q, p)) / 2,
    "jsd": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "jsd:0.1": lambda p, q: 0.1 * kl(p, 0.1 * p + 0.9 * q) + 0.9 * kl(q, 0.1 * p + 0.9 * q),
    "skew_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_forward_kl:0.4": lambda p, q: kl(p, 0.4 * p + 0.6 * q),
    # DistiLLM's skew reverse KL mixes a tenth of the student into the teacher
    "skew_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "skew_reverse_kl:0.3": lambda p, q: kl(q, 0.7 * p + 0.3 * q),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
}


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("vocabulary", [2, 37, 1009])
def test_value_and_gradient_match_autograd(name, vocabulary):
    torch.manual_seed(vocabulary)
    teacher = 3 * torch.randn(11, vocabulary, dtype=torch.float64)
    student = (3 * torch.randn(11, vocabulary, dtype=torch.float64)).requires_grad_()
    expected = TEXTBOOK[name](teacher.softmax(-1), student.softmax(-1))
    expected.sum().backward()
    value, grad = divergence(name)(teacher.log_softmax(-1), student.detach().log_softmax(-1))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, student.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TEXTBOOK)
def test_perfect_match_is_zero(name):
    log_p = torch.randn(5, 40, dtype=torch.float64).log_softmax(-1)
    value, grad = divergence(name)(log_p.clone(), log_p.clone())
    assert value.abs().max() < 1e-14 and (name == "tvd" or grad.abs().max() < 1e-14)


@pytest.mark.parametrize("name", TEXTBOOK)
def test_far_apart_distributions_stay_finite(name):
    teacher, student = torch.tensor([[90.0, -90.0, 0.0]]), torch.tensor([[-90.0, 90.0, 0.0]])
    value, grad = divergence(name)(teacher.log_softmax(-1), student.log_softmax(-1))
    assert bool(value.isfinite().all()) and bool(grad.isfinite().all())
    # two distributions that share nothing: what each divergence is at its largest
    largest = {
        "forward_kl": 180.0, "reverse_kl": 180.0, "symmetric_kl": 180.0, "jsd": math.log(2),
        "jsd:0.1": -0.1 * math.log(0.1) - 0.9 * math.log(0.9), "skew_forward_kl": -math.log(0.1),
        "skew_forward_kl:0.4": -math.log(0.4), "skew_reverse_kl": -math.log(0.1),
        "skew_reverse_kl:0.3": -math.log(0.3), "tvd": 1.0,
    }  # fmt: skip
    assert value.item() == pytest.approx(largest[name], rel=1e-5)


def test_cross_entropy_matches_torch_and_ignores_unlabelled():
    student = torch.randn(9, 31, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 30, 0, -100, 7, 8, 9, 10])
    F.cross_entropy(student, labels, reduction="sum").backward()
    value, grad = cross_entropy(labels, student.detach().log_softmax(-1))
    torch.testing.assert_close(value, F.cross_entropy(student.detach(), labels, reduction="none"))
    torch.testing.assert_close(grad, student.grad)


def test_three_classes_by_hand():
    """Logits (2, 0, -2) against (0, 0, 0) at T = 2: softmax of (1, 0, -1) against thirds."""
    e = math.e
    z = e + 1 + 1 / e
    p = [e / z, 1 / z, 1 / (e * z)]
    expected = sum(x * math.log(3 * x) for x in p)
    log_p = (torch.tensor([[2.0, 0.0, -2.0]], dtype=torch.float64) / 2).log_softmax(-1)
    value, grad = divergence("forward_kl")(log_p, torch.full((1, 3), 1 / 3, dtype=torch.float64).log())
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert grad[0].tolist() == pytest.approx([1 / 3 - x for x in p], rel=1e-12)


@pytest.mark.parametrize("name", ["forward", "tvd:0.3", "jsd:1.5", "jsd:half", ""])
def test_unknown_losses_are_refused(name):
    with pytest.raises(UserError, match="loss"):
        divergence(name)
