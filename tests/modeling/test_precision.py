"""The precision of weights, apart from that of buffers."""

import torch
from transformers import AutoModelForCausalLM, MistralConfig

from moe2dense.config.training import TrainConfig
from moe2dense.distillation.setup import prepare_model
from moe2dense.modeling.precision import cast_weights


def test_positions_stay_exact_where_weights_are_halved():
    """Far into a text the rotary angles of rounded frequencies would be others."""
    config = MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    x, far = torch.randn(1, 3, 64), torch.tensor([[0, 1000, 3000]])
    want = model.model.rotary_emb(x, far)
    cast_weights(model, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.model.rotary_emb(x, far), want, strict=True))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    cast_weights(model, torch.float32)
    trained = prepare_model(model, TrainConfig(weights="bfloat16", gradient_checkpointing=True))
    assert next(trained.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(trained.model.rotary_emb(x, far), want, strict=True))


def test_tied_weights_stay_one():
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    cast_weights(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
