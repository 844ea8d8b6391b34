"""MoE architectures are found by the fields of their configs."""

from transformers import CONFIG_MAPPING, AutoConfig, MixtralConfig, Qwen3Config

from moe2dense.families.cards import teacher_cards, unsupported_teachers
from moe2dense.modeling.moe_types import counts_experts, moe_types


def test_fields_tell():
    assert counts_experts(MixtralConfig) and not counts_experts(Qwen3Config)

    class Grown(Qwen3Config):
        num_local_experts: int = 8

    assert counts_experts(Grown)

    class Shared(Qwen3Config):
        n_shared_experts: int = 1
        num_experts_per_tok: int = 2

    assert not counts_experts(Shared)


def test_every_card_is_among_them():
    kinds = {kind.model_type: kind for kind in moe_types()}
    assert len(kinds) > 40 and list(kinds) == sorted(kinds)
    assert teacher_cards().keys() <= kinds.keys()
    assert all(kinds[name].causal for name in teacher_cards())
    others = {name for kind in kinds.values() for name in (kind.folder, *kind.wrappers)}
    assert unsupported_teachers().keys() <= kinds.keys() | others


def test_wrappers_have_the_language_model_that_they_are_listed_for():
    pairs = [(wrapper, kind.model_type) for kind in moe_types() for wrapper in kind.wrappers]
    assert ("llama4", "llama4_text") in pairs
    for wrapper, inner in pairs:
        assert wrapper in CONFIG_MAPPING and inner != wrapper
    assert AutoConfig.for_model("llama4").get_text_config().model_type == "llama4_text"
