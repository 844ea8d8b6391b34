"""The pretended GPU refuses what a GPU refuses, allows what a GPU allows, gives the CPU's numbers, and counts."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.device.pretend import PretendedCuda, PretendedTensor


@pytest.fixture
def counts():
    with PretendedCuda() as counted:
        yield counted


def test_tensors_say_where_they_are(counts):
    made, moved = torch.ones(2, 3, device="cuda"), torch.ones(3, 2).to("cuda:0")
    for tensor in (made, moved, made @ moved, made.new_zeros(2), torch.empty_like(made), made[:, :1], made.bfloat16()):
        assert isinstance(tensor, PretendedTensor) and tensor.is_cuda and tensor.device == torch.device("cuda", 0)
    assert not (made @ moved).cpu().is_cuda and (made @ moved).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert torch.empty_like(made, device="meta").is_meta and not torch.zeros_like(made, device="cpu").is_cuda


def test_devices_do_not_mix(counts):
    there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
    for mixed in (
        lambda: there @ here,
        lambda: there + here[0],
        lambda: here[there[0].long()],
        lambda: torch.cat([there, here]),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: there.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
        lambda: here.add_(there),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())


def test_what_a_gpu_allows(counts):
    there = torch.arange(6.0, device="cuda").view(2, 3)
    assert (there * torch.tensor(2.0)).sum().item() == 30  # a scalar on the CPU
    assert there[torch.tensor([True, False])].tolist() == [[0.0, 1.0, 2.0]]  # CPU indices
    there[torch.tensor([1])] = 0
    here = torch.zeros(2, 3)
    here.copy_(there)
    assert here.sum() == 3


def test_a_module_moves_trains_and_comes_back_as_itself(counts):
    module, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(module.state_dict())
    weight, x = module.weight, torch.randn(5, 4)
    for model, inputs in ((module, x.to("cuda")), (plain, x)):
        model.to(inputs.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert module.weight is weight and weight.is_cuda
    module.to("cpu")
    assert module.weight is weight and torch.equal(weight, plain.weight)


def test_accelerate_takes_it_for_a_gpu(counts):
    accelerator, module = Accelerator(), nn.Linear(4, 3)
    module, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=0.1))
    accelerator.backward(module(torch.ones(2, 4, device="cuda")).sum())
    optimizer.step()
    assert accelerator.device.type == "cuda" and module.weight.is_cuda


def test_work_and_waits_are_counted(counts):
    there, here = torch.ones(4, 5, device="cuda"), torch.ones(5, 6)
    _ = there @ here.to("cuda"), torch.ones(2, 5) @ here
    assert (counts.on("cuda"), counts.on("cpu")) == (2 * 4 * 5 * 6, 2 * 2 * 5 * 6) and counts.cpu_share == 1 / 3
    assert sum(n for (way, _), n in counts.moved.items() if way == "to cuda") == here.nbytes
    waits = sum(counts.waits.values())
    _ = there.sum().item(), there.nonzero(), there.cpu()
    assert sum(counts.waits.values()) == waits + 3
