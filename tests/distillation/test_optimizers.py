"""Muon beside AdamW: against torch's two optimisers used by hand, and over a checkpoint; the rules of defaults."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.config.schedules import learning_rate
from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.batching import step_blocks
from moe2dense.distillation.checkpoints import optimizer_tensors, restore_optimizer
from moe2dense.distillation.checks import check_training
from moe2dense.distillation.cost import passes, uses_muon
from moe2dense.distillation.optimizers import MUON_RATE, MuonAdamW, layer_matrices, make_optimizer
from moe2dense.errors import UserError

CONFIG = MistralConfig(
    vocab_size=37, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
    head_dim=4, max_position_embeddings=16, tie_word_embeddings=False,
)  # fmt: skip


def make_model(seed):
    torch.manual_seed(seed)
    return MistralForCausalLM(CONFIG)


def make_blocks(count=9):
    return Blocks(torch.randint(0, 37, (count, 8), generator=torch.Generator().manual_seed(3)))


def by_hand(model, teacher, blocks, config, steps, per_step):
    """Train with torch's own Muon and AdamW on the plain KL of all logits."""
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        ids = blocks.input_ids[step_blocks(len(blocks), per_step, step, 0)]
        with torch.no_grad():
            goal = teacher(ids).logits.softmax(-1)
        loss = F.kl_div(model(ids).logits.log_softmax(-1), goal, reduction="none").sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        rate = learning_rate(step, steps, config.lr, config.warmup)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = rate * MUON_RATE, rate
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()


def by_singular_values(matrix, coefficients, steps, eps):
    """Make a matrix nearly orthogonal as Newton-Schulz does, without the digits that torch's loses in bfloat16."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=eps)
    for _ in range(steps):
        s = sum(c * s**power for c, power in zip(coefficients, (1, 3, 5), strict=True))
    return (u @ torch.diag(s) @ v).to(matrix)


def test_training_with_muon_equals_torchs_two_optimisers(monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", by_singular_values)
    student, teacher, blocks = make_model(1), make_model(2), make_blocks()
    expected = copy.deepcopy(student)
    config = TrainConfig(epochs=2, batch=24, lr=1e-3, optimizer="muon", features="")
    by_hand(expected, teacher, blocks, config, 6, 3)
    distill(student, teacher, blocks, config=config)
    for (name, ours), value in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, value, atol=2e-5, rtol=0, msg=name)
        assert not torch.equal(value, dict(make_model(1).named_parameters())[name])


def test_the_state_of_both_survives_a_checkpoint():
    model = make_model(4)
    other = copy.deepcopy(model)

    def step(which, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in which.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    config = TrainConfig(lr=1e-2, weight_decay=0.1)
    first, second = (make_optimizer(m, config, layer_matrices(m)) for m in (model, other))
    assert isinstance(first, MuonAdamW)
    step(model, first, 0)
    names = {p: n for n, p in model.named_parameters()}
    saved = optimizer_tensors(first, names)
    assert {k.rpartition("/")[2] for k in saved} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    other.load_state_dict(model.state_dict())
    second.load_state_dict(second.state_dict())  # as accelerate does where it moves an optimiser
    restore_optimizer(second, {p: n for n, p in other.named_parameters()}, saved)
    step(model, first, 1)
    step(other, second, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "hidden", "expected"),
    [
        ({}, 192, True),
        ({}, 682, True),
        ({}, 683, False),
        ({"batch": 16384}, 4096, True),
        ({"optimizer": "adamw"}, 192, False),
        ({"optimizer": "muon"}, 4096, True),
        ({"lora": 8}, 192, False),
        ({"shard": True}, 192, False),
    ],
)
def test_muon_where_the_batch_pays_for_it(options, hidden, expected):
    assert uses_muon(TrainConfig(**options), hidden) is expected


@pytest.mark.parametrize(
    ("options", "tokens", "parameters", "expected"),
    [
        ({}, 490_000, 3_200_000, 5),
        ({}, 200_000, 3_200_000, 2),
        ({}, 500_000, 7_000_000_000, 1),
        ({}, 10**9, 7 * 10**9, 5),
        ({}, 70 * 10**9, 7 * 10**9, 2),
        ({}, 10**12, 7 * 10**9, 1),
        ({"epochs": 0.5}, 490_000, 3_200_000, 0.5),
        ({"alpha": 1.0}, 490_000, 3_200_000, 1),
        ({"regime": "on-policy"}, 490_000, 3_200_000, 1),
        ({"target_format": "sampled"}, 490_000, 3_200_000, 1),
        ({}, 0, 100, 1),
    ],
)
def test_passes_follow_from_the_tokens_for_each_parameter(options, tokens, parameters, expected):
    assert passes(TrainConfig(**options), tokens, parameters) == expected


@pytest.mark.parametrize(("options", "named"), [({"lora": 4}, "--lora"), ({"shard": True}, "train.shard")])
def test_muon_is_refused_where_matrices_are_not_whole(options, named):
    with pytest.raises(UserError, match=f"takes whole matrices, which {named}"):
        check_training(TrainConfig(optimizer="muon", **options))
