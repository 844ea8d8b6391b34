"""Hosts whose card says that channels or layers cannot be cut: refused by name where they are asked for, kept where they are not."""

import pytest
from transformers import AutoConfig

from moe2dense.errors import UserError
from moe2dense.families.cards import teacher_cards
from moe2dense.student.target.resolve import resolve_target
from tests.teacher.families import tiny_sizes


def target(family, to, prune):
    sizes = {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 512} | (
        {"layer_types": ["mamba", "attention"] * 4, "shared_intermediate_size": 128}
        if family == "granitemoehybrid"
        else {}
    )
    config = AutoConfig.for_model(family, **tiny_sizes(family, **sizes))
    return resolve_target(to, config, teacher_cards()[family], prune=prune)


@pytest.mark.parametrize(
    ("family", "prune", "what"),
    [("jamba", "depth", "layers"), ("jamba", "width", "channels"), ("granitemoehybrid", "width", "channels")],
)
def test_what_cannot_be_cut_is_named(family, prune, what):
    with pytest.raises(
        UserError, match=rf"build.prune = '{prune}' is not possible with the host '{family}', .* all {what}"
    ):
        target(family, "30%", prune)


def test_a_budget_takes_layers_and_leaves_channels():
    got = target("granitemoehybrid", "20%", "depth")
    assert got.config.hidden_size == 128 and got.config.num_hidden_layers < 8
    assert len(got.config.layer_types) == got.config.num_hidden_layers
