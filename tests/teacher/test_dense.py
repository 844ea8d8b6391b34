"""Models without experts stream through the same path: a student may become a teacher."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Llama4Config, Llama4ForConditionalGeneration

from moe2dense.teacher.load import load_teacher
from tests.teacher.families import blocks, make

SIZES = {"intermediate_size": 37}
DENSE = {
    "mistral": {"sliding_window": 7},
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "ernie4_5": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 9},
    "cohere": {"logit_scale": 0.25},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("memory", ["auto", "17MB"])
def test_dense_teacher(name, memory, tmp_path):
    reference = make(name, tmp_path, **SIZES, **DENSE[name])
    ids, mask = blocks(reference, seed=1), torch.ones(4, 23, dtype=torch.long)
    mask[1, 15:] = 0
    teacher = load_teacher(tmp_path, memory=memory)
    assert teacher.card is None and teacher.ignored == []
    out = teacher.run(ids, attention_mask=mask)
    want = reference(ids, attention_mask=mask, output_hidden_states=True)
    real = mask.bool()
    assert (out.logits - want.logits)[real].abs().max() <= 1e-4
    for layer in teacher.stream(ids, attention_mask=mask):
        assert not layer.sparse and layer.experts is None and layer.top_k_index is None
        assert (layer.hidden_in - want.hidden_states[layer.index])[real].abs().max() <= 1e-4
        assert (layer.dense(layer.x) - layer.y)[layer.token_mask].abs().max() <= 1e-4


def test_packing_in_a_dense_teacher(tmp_path):
    reference = make("qwen3", tmp_path, **SIZES, head_dim=8)
    ids = blocks(reference, n=1, seed=2)
    documents = torch.tensor([[4] * 9 + [2] * 14])
    out = load_teacher(tmp_path).run(ids, document_ids=documents).logits
    assert (out[:, :9] - reference(ids[:, :9]).logits).abs().max() <= 1e-4
    assert (out[:, 9:] - reference(ids[:, 9:]).logits).abs().max() <= 1e-4


def test_language_model_inside_a_multimodal_checkpoint(tmp_path):
    """llama4's hub layout: a prefix on the language model's tensors, and a vision tower that is ignored by name."""
    make("llama4_text", tmp_path / "text")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    vision = {
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text.config.to_dict(), vision_config=vision))
    whole.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for key, value in load_file(tmp_path / "text" / "model.safetensors").items():
        assert f"language_model.{key}" in tensors
        tensors[f"language_model.{key}"] = value
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    teacher = load_teacher(tmp_path / "whole")
    assert teacher.card is not None and teacher.card.model_type == "llama4_text"
    assert teacher.ignored and all(not k.startswith("language_model.") for k in teacher.ignored)
    ids = blocks(text)
    with torch.no_grad():
        assert (teacher.run(ids).logits - text(ids).logits).abs().max() <= 1e-4
