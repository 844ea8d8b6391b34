"""The decoder and its layers are found in every family, also where a model names itself as its own base model."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from moe2dense.errors import UserError
from moe2dense.modeling.decoder import decoder_layers, decoder_of
from moe2dense.modeling.forward import evaluation_mode, final_hidden
from moe2dense.modeling.head import output_head
from moe2dense.modeling.kinds import language_model, without_adapters

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
_LLAMA4 = {
    **_SIZES, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 8,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=16)),
    "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(**_LLAMA4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)),
}


@pytest.mark.parametrize("family", MODELS)
def test_layers_and_final_states(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    assert len(decoder_layers(model)) == 2
    assert decoder_of(model) is not model
    ids = torch.arange(6)[None]
    hidden = final_hidden(model, {"input_ids": ids})
    assert hidden.shape == (1, 6, 32)
    head = output_head(model)  # checks the logits of the final states against the model's own
    torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits)


def test_adapters_are_looked_through():
    from peft import LoraConfig, get_peft_model

    model = MODELS["llama"]()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert without_adapters(adapted) is model
    assert decoder_of(adapted) is model.model
    assert decoder_layers(adapted) is model.model.layers


def test_language_model_of_a_student_or_a_model():
    model = MODELS["llama"]()
    assert language_model(model) is model
    with pytest.raises(UserError, match="a Student or a causal language model of transformers is needed; found str"):
        language_model("a path")  # type: ignore[arg-type]


def test_evaluation_mode_is_undone_also_after_an_error():
    model = MODELS["llama"]().train()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not model.training
        raise RuntimeError
    assert model.training


def test_a_model_in_memory_runs_without_a_word():
    """Whole and with a cache: no deprecation warning and no line of transformers' own."""
    script = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from moe2dense.modeling.decoder import decoder_of
from moe2dense.modeling.forward import final_hidden
from moe2dense.modeling.internals import cache_arguments, cache_of
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, intermediate_size=16)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.arange(6)[None]
with torch.no_grad():
    want = final_hidden(model, {"input_ids": ids})
    decoder, cache, parts = decoder_of(model), None, []
    for token in ids.T:
        out = decoder(input_ids=token[None], use_cache=True, **cache_arguments(decoder, cache))
        cache = cache_of(out)
        parts.append(out.last_hidden_state)
torch.testing.assert_close(torch.cat(parts, 1), want)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
