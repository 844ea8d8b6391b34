"""The public checkpoints on the cards: names, licences, and geometry that counts to the published number of parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe2dense.families.cards import find_checkpoint, teacher_cards
from moe2dense.modeling.shape import teacher_geometry

# billions of parameters of the language model as transformers builds it (no vision tower, no multi-token prediction)
PUBLISHED = {
    "mixtral": 46.7, "mixtral-8x22b": 140.6, "qwen1.5-moe-a2.7b": 14.3, "qwen2-57b-a14b": 57.4, "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1, "olmoe": 6.92, "flexolmo": 33.3, "deepseek-v2-lite": 15.7, "deepseek-v2-236b": 235.7,
    "deepseek-v3": 671.0, "moonlight": 15.96, "gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8, "phi-3.5-moe": 41.9,
    "granite-1b-a400m": 1.335, "granite-3b-a800m": 3.30, "glm-4.5-air": 106.85, "glm-4.5": 352.8, "scout": 107.8,
    "maverick": 400.7, "ernie-4.5-21b-a3b": 21.8, "hunyuan-a13b": 80.4, "dots.llm1": 142.8, "lfm2-8b-a1b": 8.34,
    "minimax-m2": 228.7, "qwen3-next-80b-a3b": 79.7,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_geometry_counts_to_the_published_size(name):
    found = find_checkpoint(name)
    assert found is not None
    card, row = found
    assert row.license and "/" in row.id
    config = AutoConfig.for_model(card.model_type, **row.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=3e-3)
    shape = teacher_geometry(config, card)
    assert shape.parameters == total and 0 < shape.active_parameters < total
    assert shape.moe_layers and shape.expert_parameters * shape.num_experts * len(shape.moe_layers) < total


def test_names_are_unique():
    rows = [row for card in teacher_cards().values() for row in card.checkpoints]
    names = [n.lower() for row in rows for n in (row.id, *row.aliases)]
    assert len(names) == len(set(names))
    for name in ("qwen2_moe", "deepseek_v3", "gpt_oss"):
        found = find_checkpoint(name)
        assert found is not None and found[0].model_type == name
