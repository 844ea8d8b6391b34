"""Which blocks are trained on, against brute force."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.distillation.select_blocks import (
    Selection,
    block_divergence,
    facility_location,
    parse_selection,
    select_blocks,
)
from moe2dense.distillation.targets.memory import HiddenTargets
from moe2dense.errors import UserError
from moe2dense.modeling.head import model_head


def small(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def setting():
    ids = torch.randint(3, 61, (11, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    labels[4] = False
    blocks, teacher = Blocks(ids, labels_mask=labels), small(1)
    hidden = teacher.base_model(input_ids=ids).last_hidden_state
    return blocks, HiddenTargets(hidden, model_head(teacher)), teacher, small(2)


def test_divergence_is_the_mean_kl_of_a_block(setting):
    blocks, targets, teacher, student = setting
    p, q = (m(blocks.input_ids).logits.double().log_softmax(-1) for m in (teacher, student))
    kl, mask = (p.exp() * (p - q)).sum(-1), blocks.loss_mask()
    wanted = torch.stack([kl[i][mask[i]].mean() if mask[i].any() else torch.tensor(0.0) for i in range(11)])
    torch.testing.assert_close(
        block_divergence(student, targets, blocks, batch=4), wanted.float(), rtol=1e-4, atol=1e-5
    )
    rows, _ = select_blocks(student, targets, blocks, Selection("divergence", 0.3))
    assert rows == sorted(wanted.topk(3).indices.tolist())


def test_facility_location_is_greedy_and_near_the_best():
    generator = torch.Generator().manual_seed(3)
    features = normalize(torch.randn(9, 4, generator=generator), dim=-1)
    weights = torch.rand(9, generator=generator)

    def worth(rows):
        return float((weights * ((features @ features[list(rows)].T).amax(1) + 1)).sum())

    chosen = facility_location(features, weights, 3)
    assert len(set(chosen)) == 3
    for k in range(3):
        assert worth(chosen[: k + 1]) == pytest.approx(max(worth([*chosen[:k], j]) for j in range(9)), rel=1e-5)
    assert worth(chosen) >= (1 - 1 / 2.71828) * max(worth(c) for c in itertools.combinations(range(9), 3))
    assert sorted(facility_location(features, weights, 50)) == list(range(9))


def test_coreset_stands_for_every_group(setting):
    blocks, targets, _, student = setting
    rows, _ = select_blocks(student, targets, blocks, Selection("coreset", 0.5))
    assert rows == sorted(set(rows)) and len(rows) == 6
    with pytest.raises(UserError, match="needs `hidden` targets"):
        select_blocks(student, _Logits(targets), blocks, Selection("coreset", 0.5))


class _Logits:
    """Targets that hold no hidden states."""

    def __init__(self, targets):
        self.targets = targets

    def batch(self, rows):
        from moe2dense.losses.teacher_rows import LogitRows

        rows_of = self.targets.batch(rows)
        return LogitRows(rows_of.head.logits(rows_of.hidden))


def test_settings():
    assert parse_selection("") is None
    assert parse_selection("coreset:0.25") == Selection("coreset", 0.25)
    for bad in ("divergence", "entropy:0.5", "coreset:0", "coreset:1.5", "coreset:x"):
        with pytest.raises(UserError, match="divergence:SHARE or coreset:SHARE"):
            parse_selection(bad)
