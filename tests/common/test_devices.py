"""Devices by name, models that visit a device, rows computed where they do not rest, and how exact products are."""

import pytest
import torch
from torch import nn

from moe2dense.common import devices
from moe2dense.common.devices import CPU, by_rows, exact_products, fast_products, moved_to, pick_device
from moe2dense.errors import UserError
from tests.device.pretend import PretendedCuda


def test_a_device_has_a_number():
    """As the tensors on it say it, so that equal devices compare equal."""
    with PretendedCuda():
        assert pick_device("auto") == pick_device("cuda") == torch.ones(1, device="cuda").device
        assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")
    with pytest.raises(UserError, match="auto, cpu or cuda"):
        pick_device("abacus")


def test_a_model_visits_a_device_where_it_fits(monkeypatch):
    with PretendedCuda():
        gpu, module = pick_device("cuda"), nn.Linear(3, 2)
        weight = module.weight
        with moved_to(module, gpu) as where:
            assert where == gpu and module.weight.is_cuda and module.weight is weight
        assert not module.weight.is_cuda and module.weight is weight
        monkeypatch.setattr(devices, "free_bytes", lambda device: 30)
        with moved_to(module, gpu) as where:
            assert where == CPU and not module.weight.is_cuda
        module.to(gpu)
        with moved_to(module, CPU) as where:  # what is on an accelerator stays there
            assert where == gpu and module.weight.is_cuda


def test_rows_that_rest_elsewhere_are_computed_on_the_device():
    with PretendedCuda() as counts:
        gpu, x, weight = pick_device("cuda"), torch.randn(7, 4), torch.randn(4, 2)
        want = x @ weight
        before, there = counts.on("cpu"), weight.to(gpu)
        got = by_rows(lambda rows: rows @ there, [x], gpu, rows=3)
        assert not got.is_cuda and counts.on("cpu") == before
        torch.testing.assert_close(got, want)
        assert by_rows(lambda rows: rows @ there, [x.to(gpu)], gpu).is_cuda


def test_exactness_is_as_it_was_afterwards():
    before = torch.backends.cuda.matmul.allow_tf32
    with fast_products():
        assert torch.backends.cuda.matmul.allow_tf32
        with exact_products():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before
