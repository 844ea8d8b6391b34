"""Tokens of tool calls may weigh more than others in the loss against the teacher."""

import dataclasses

import pytest
import torch

from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks, join_blocks
from moe2dense.distillation.api import _token_weights
from moe2dense.distillation.checks import check_training
from moe2dense.errors import UserError


def random_blocks(calls=True):
    ids = torch.randint(3, 50, (5, 12))
    learnt = torch.rand(5, 12) < 0.7
    return Blocks(ids, labels_mask=learnt, calls_mask=(torch.rand(5, 12) < 0.4) & learnt if calls else None)


def test_weights_are_of_the_next_token_and_have_mean_one():
    blocks, config = random_blocks(), TrainConfig(call_weight=3.0)
    weights = _token_weights(config, None, blocks)
    counted = blocks.loss_mask()
    assert weights is not None and blocks.calls_mask is not None
    assert weights[counted].mean().item() == pytest.approx(1, abs=1e-5) and not weights[~counted].any()
    values = {}
    for row, place in counted.nonzero().tolist():
        values.setdefault(bool(blocks.calls_mask[row, place + 1]), set()).add(round(float(weights[row, place]), 5))
    assert len(values[True]) == len(values[False]) == 1
    assert values[True].pop() == pytest.approx(3 * values[False].pop(), rel=1e-4)


def test_nothing_weighs_more_without_calls_or_by_default():
    assert _token_weights(TrainConfig(), None, random_blocks()) is None
    assert _token_weights(TrainConfig(call_weight=3.0), None, random_blocks(calls=False)) is None
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="train.call_weight must be a number above 0"):
            check_training(dataclasses.replace(TrainConfig(), call_weight=bad))


def test_the_mask_follows_its_blocks():
    one, other = random_blocks(), random_blocks(calls=False)
    both = join_blocks([one, other])
    assert both.calls_mask is not None and one.calls_mask is not None
    assert torch.equal(both.calls_mask[:5], one.calls_mask) and not both.calls_mask[5:].any()
    assert torch.equal(both[3:6].calls_mask, both.calls_mask[3:6])  # type: ignore[arg-type]
