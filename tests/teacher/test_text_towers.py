"""Multimodal checkpoints as the hub has them: the language model is read and equals transformers', the rest is ignored and said."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from moe2dense.errors import UserError
from moe2dense.families.cards import unsupported_teachers
from moe2dense.families.resolve import resolve_teacher
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import BASE, FAMILIES, tiny_sizes

QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24,
    "num_position_embeddings": 16,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 12345.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
# multimodal model: (family it is read as, text tower's settings, vision tower's settings)
WHOLE = {
    "qwen3_5_moe": ("qwen3_5_moe_text", FAMILIES["qwen3_5_moe_text"], QWEN_VISION),
    "qwen3_vl_moe": (
        "qwen3_moe",
        {
            "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "intermediate_size": 19, "head_dim": 8,
            "mlp_only_layers": [0], "rope_parameters": MROPE, "tie_word_embeddings": False,
        },
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "glm4v_moe": (
        "glm4_moe",
        {
            "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "intermediate_size": 19, "head_dim": 8,
            "routed_scaling_factor": 1.7,
            "rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        },
        {**QWEN_VISION, "image_size": 16},
    ),
    "gemma4": (
        "gemma4_text",
        FAMILIES["gemma4_text"],
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
        },
    ),
    "kimi_k25": (
        "deepseek_v3",
        {**FAMILIES["deepseek_v3"], "q_lora_rank": 10},  # as Kimi's; a plain q_proj would be saved fused with those of images
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
            "pos_emb_height": 4, "pos_emb_width": 4,
        },
    ),
    "minimax_m3_vl": (
        "minimax_m3_vl_text",
        FAMILIES["minimax_m3_vl_text"],
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    ),
}  # fmt: skip


def multimodal(model_type, folder, **changes):
    """A random multimodal model, saved as the hub has it, and returned as the reference; changes: fields of its text tower."""
    _, text, vision = WHOLE[model_type]
    torch.manual_seed(0)
    tied = text.get("tie_word_embeddings", False)
    config = AutoConfig.for_model(
        model_type,
        text_config=copy.deepcopy({**BASE, **text, **changes}),
        vision_config=vision,
        tie_word_embeddings=tied,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.normal_(0.0, 0.1 if "bias" in name or "norm" in name else 0.3)
            if "norm" in name and "bias" not in name:
                value.add_(1.0)
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("stored", ["as transformers saves it", "as it is in memory"])
@pytest.mark.parametrize("model_type", WHOLE)
def test_the_language_model_of_a_multimodal_checkpoint(model_type, stored, tmp_path):
    """Public checkpoints have either layout: an expert's matrices one by one, or all experts of a layer in one tensor."""
    reference = multimodal(model_type, tmp_path)
    if stored == "as it is in memory":
        tensors = {name: value.contiguous() for name, value in reference.state_dict().items()}
        if reference.config.get_text_config().tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"\d+ tensors are ignored, which the model has no place for: "):
        teacher = load_teacher(tmp_path)
    assert teacher.card is not None and teacher.card.model_type == WHOLE[model_type][0]
    assert teacher.ignored and not any("language_model" in name or "lm_head" in name for name in teacher.ignored)
    assert resolve_teacher(str(tmp_path)).card == teacher.card
    ids = torch.randint(3, 101, (3, 23), generator=torch.Generator().manual_seed(1))
    want, got = reference(input_ids=ids).logits, teacher.run(ids).logits
    assert (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))


def test_a_family_that_cannot_be_a_teacher_is_refused_with_its_reason(tmp_path):
    AutoConfig.for_model("deepseek_v4").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'deepseek_v4' cannot be a teacher: hyper-connections carry"):
        load_teacher(tmp_path)
    assert "deepseek_v4" in unsupported_teachers()


def test_layers_that_take_over_the_choice_of_others_are_refused(tmp_path):
    sizes = tiny_sizes("glm_moe_dsa", indexer_types=["full", "shared", "full"])
    AutoConfig.for_model("glm_moe_dsa", **sizes).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"GLM-5 with indexer_types = 'shared' cannot be a teacher: .* only 'full' can be read"
    ):
        load_teacher(tmp_path)
