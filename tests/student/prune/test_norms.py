"""Norms over fewer channels give what they gave over all: multiplying with the weight or with one plus it, with means and biases."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from moe2dense.data.blocks import Blocks
from moe2dense.student.build.api import build_student
from moe2dense.student.prune.norms import NormFactors, norm_factors, scale_norms
from moe2dense.teacher.load import load_teacher
from tests.student.prune.test_cut import target_for
from tests.teacher.families import make

CHANNELS, KEPT = 23, 15


@pytest.fixture
def keep():
    return torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))[:KEPT].sort().values


def cut(norm: nn.Module, make_norm, keep) -> nn.Module:
    """The norm over the channels `keep` with the weights it has there."""
    small = make_norm(KEPT)
    small.load_state_dict({name: value[keep] for name, value in norm.state_dict().items()})
    return small


@pytest.mark.parametrize(
    ("make_norm", "centred"),
    [
        (lambda n: LlamaRMSNorm(n, eps=1e-12), False),
        (lambda n: Qwen3NextRMSNorm(n, eps=1e-12), False),
        (lambda n: nn.LayerNorm(n, eps=1e-12), True),
        (lambda n: nn.LayerNorm(n, eps=1e-12, bias=False), True),
    ],
    ids=["weight", "one plus weight", "mean and bias", "mean"],
)
def test_exact_where_the_dropped_channels_carry_nothing(make_norm, centred, keep):
    torch.manual_seed(1)
    norm = make_norm(CHANNELS)
    for value in norm.parameters():
        value.data.normal_(0.3, 1.0)
    x = torch.zeros(3, 5, CHANNELS)
    x[..., keep] = torch.randn(3, 5, KEPT) + 0.7
    if centred:  # a dropped channel that stands at the mean changes no deviation
        x += (~torch.isin(torch.arange(CHANNELS), keep)) * x[..., keep].mean(-1, keepdim=True)
    small = cut(norm, make_norm, keep)
    group = nn.ModuleDict({"some_norm": small, "mlp": nn.LayerNorm(KEPT)})
    untouched = group["mlp"].weight.clone()
    scale_norms(group, KEPT, norm_factors(x, keep, torch.ones(15, dtype=torch.bool)))
    torch.testing.assert_close(small(x[..., keep]), norm(x)[..., keep], rtol=1e-4, atol=1e-4)
    assert torch.equal(group["mlp"].weight, untouched)


def test_factors_are_means_over_real_tokens(keep):
    hidden = torch.randn(2, 4, CHANNELS, dtype=torch.float64)
    real = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
    rows = hidden.flatten(0, 1)[real]
    rms = sum(float(r[keep].pow(2).mean().sqrt() / r.pow(2).mean().sqrt()) for r in rows) / 5
    std = sum(float(r[keep].std(correction=0) / r.std(correction=0)) for r in rows) / 5
    got = norm_factors(hidden, keep, real)
    assert (got.rms, got.std) == pytest.approx((rms, std))


def test_norms_of_another_width_stay(keep):
    group = nn.ModuleDict({"q_norm": LlamaRMSNorm(KEPT + 1)})
    scale_norms(group, KEPT, NormFactors(2.0, 2.0))
    assert torch.equal(group["q_norm"].weight, torch.ones(KEPT + 1))


@pytest.mark.parametrize("family", ["qwen3_next", "glm4_moe", "qwen2_moe"])
def test_a_student_without_channels_that_carry_nothing_is_exact(family, tmp_path):
    """Eight channels stay zero throughout a teacher of equal experts."""
    model = make(family, tmp_path / "t", alike=True, rms_norm_eps=1e-10)
    dead = torch.tensor([0, 3, 4, 9, 13, 17, 20, 23])
    for name, value in model.state_dict().items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            value[dead] = 0
        elif name.endswith("experts.down_proj") or "embed_tokens" in name:
            value[:, dead] = 0
    model.save_pretrained(tmp_path / "d")
    teacher = load_teacher(tmp_path / "d", experts="streamed")
    ids = torch.randint(3, 101, (4, 23), generator=torch.Generator().manual_seed(0))
    student = build_student(teacher, target_for(teacher, 28, hidden_size=16), Blocks(ids), init="average")
    with torch.no_grad():
        got, want = (m(ids).logits.log_softmax(-1) for m in (student.model, model))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
