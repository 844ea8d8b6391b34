"""Optimisers that hold less, against torch's own on the whole model at once."""

import copy

import pytest
import torch
from torch import nn

from moe2dense.config.training import TrainConfig
from moe2dense.distillation.optimizers import make_optimizer
from moe2dense.optimizers.footprint import standing_bytes
from moe2dense.optimizers.memory_ladder import changed, in_words, rungs
from moe2dense.optimizers.packed_state import pack, unpack
from moe2dense.optimizers.rounding import round_at_random
from moe2dense.optimizers.tensorwise import BETAS, TensorwiseOptimizer
from tests.distillation.tiny_run import make_student, weights


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def decay_groups(parameters, decay):
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def trained(model, optimizer, steps=5):
    for step in range(steps):
        gradients(model, step)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_stepping_tensor_by_tensor_is_adamw(offload, decay):
    one, other = make_student(), make_student()
    groups = decay_groups(one.parameters(), decay)
    plain = torch.optim.AdamW(groups, lr=3e-3, betas=BETAS)
    tensorwise = TensorwiseOptimizer(decay_groups(other.parameters(), decay), 3e-3, offload=offload)
    expected, found = trained(one, plain), trained(other, tensorwise)
    assert all(torch.allclose(expected[k], found[k], rtol=1e-5, atol=1e-7) for k in expected)
    assert all(p.grad is None for p in other.parameters())


def test_adafactor_is_that_of_torch():
    one, other = make_student(), make_student()
    plain = torch.optim.Adafactor(one.parameters(), lr=2e-3, eps=(None, 1.0), weight_decay=0.0, foreach=False)
    ours = make_optimizer(other, TrainConfig(optimizer="adafactor", lr=2e-3))
    expected, found = trained(one, plain, 4), trained(other, ours, 4)
    assert all(torch.allclose(expected[k], found[k], rtol=1e-4, atol=1e-6) for k in expected)


def test_packed_moments_keep_their_size():
    torch.manual_seed(0)
    first = torch.randn(70, 111) * torch.logspace(-6, 2, 111)
    second = first.square() + 1e-12
    state = unpack(pack({"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second}), first.shape)
    assert state["step"] == 3 and state["exp_avg"].shape == first.shape
    assert (state["exp_avg"] - first).norm() < 0.02 * first.norm()
    assert (state["exp_avg_sq"] > 0).all() and (state["exp_avg_sq"] - second).norm() < 0.02 * second.norm()
    zero = unpack(pack({"exp_avg_sq": torch.zeros(5000)}), torch.Size([5000]))
    assert not zero["exp_avg_sq"].any()
    packed = pack({"exp_avg": first})
    assert sum(t.nbytes for t in packed.values()) < 1.1 * first.numel()
    small = torch.randn(10)
    assert pack({"exp_avg": small})["exp_avg"] is small


def test_rounding_at_random_is_right_on_average():
    torch.manual_seed(0)
    value = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 0.0, 2.0, 1e-30])
    mean = torch.stack([round_at_random(value).float() for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, value, rtol=3e-4, atol=1e-31)
    exact = torch.tensor([1.5, -0.25, 0.0])
    assert torch.equal(round_at_random(exact).float(), exact)


def test_small_steps_add_up_in_bfloat16():
    torch.manual_seed(0)
    tensor = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = TensorwiseOptimizer([{"params": [tensor]}], 1e-4)
    for _ in range(100):
        tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    assert float(tensor.detach().float().mean()) == pytest.approx(1 - 100 * 1e-4, abs=1e-3)


def test_the_ladder_changes_only_what_is_not_set():
    plain = list(rungs(TrainConfig(), 2048, on_gpu=True))
    assert plain[0] == {} and plain[1] == {"gradient_checkpointing": True}
    assert any(changes.get("offload") for changes in plain)
    assert not any("step_in_backward" in changes for changes in rungs(TrainConfig(batch=1 << 16), 2048, on_gpu=True))
    assert all(changes.get("optimizer") is None for changes in rungs(TrainConfig(optimizer="muon"), 2048, on_gpu=True))
    assert len(list(rungs(TrainConfig(lora=8), 2048, on_gpu=True))) == 3
    text = in_words(plain[4])
    assert "train.optimizer = adamw-8bit" in text and "train.step_in_backward = true" in text
    assert changed(TrainConfig(), plain[4]).weights == "bfloat16"


@pytest.mark.parametrize("batch", [2048, 1 << 16])
def test_on_a_cpu_bfloat16_comes_last(batch):
    config = TrainConfig(batch=batch)
    ways = [changed(config, changes) for changes in rungs(config, 2048, on_gpu=False)]
    assert [way.weights for way in ways] == ["float32"] * (len(ways) - 1) + ["bfloat16"]
    assert not any(way.offload for way in ways)
    assert any(way.step_in_backward for way in ways) is (batch == 2048)
    needs = [standing_bytes(way, 1000, 1000) for way in ways]
    assert needs == sorted(needs, reverse=True)


def test_the_state_of_a_copy_is_its_own():
    """The optimiser keeps no tensor of the model's that a step would change behind its back."""
    model = make_student()
    optimizer = TensorwiseOptimizer(decay_groups(model.parameters(), 0.0), 1e-3, offload=True)
    gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[model.lm_head.weight]["master"])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(optimizer.state[model.lm_head.weight]["master"], before)
