"""The trained example teacher: streamed == transformers' own forward, and the statistics against brute force."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.data.load import load_blocks
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import RoutingStats

TINY = Path(__file__).parents[2] / "examples" / "tiny-mixtral"


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("memory", ["auto", "17MB"])
def test_streamed_equals_transformers(reference, memory):
    ids = torch.randint(0, reference.config.vocab_size, (5, 37))
    teacher = load_teacher(TINY, memory=memory)
    assert teacher.resident == (memory == "auto") and teacher.ignored == []
    out = teacher.run(ids)
    want = reference(ids, output_hidden_states=True)
    assert (out.logits - want.logits).abs().max() <= 1e-4
    assert (out.hidden_states - want.hidden_states[-1]).abs().max() <= 1e-4
    assert (teacher.head.logits(out.hidden_states) - out.logits).abs().max() == 0


def test_layer_pass_holds_what_the_layer_did(reference):
    ids = torch.randint(0, reference.config.vocab_size, (3, 41))
    seen = {}
    for i, layer in enumerate(reference.model.layers):
        layer.mlp.register_forward_hook(
            lambda _m, a, out, i=i: seen.update({i: (a[0].flatten(0, 1), out.flatten(0, 1))})
        )
    want = reference(ids, output_hidden_states=True)
    stream = load_teacher(TINY, memory="17MB").stream(ids)
    for layer in stream:
        x, y = seen[layer.index]
        assert (layer.x - x).abs().max() <= 1e-4 and (layer.y - y).abs().max() <= 1e-4
        assert (layer.hidden_in - want.hidden_states[layer.index]).abs().max() <= 1e-4
        mine = layer.module.self_attn.q_proj.weight
        assert torch.equal(mine, reference.model.layers[layer.index].self_attn.q_proj.weight)
        with torch.no_grad():
            called = layer.module.input_layernorm(layer.hidden_in)
            mixed, _ = layer.module.self_attn(called, **layer.layer_inputs(slice(0, 3)))
            rebuilt = layer.hidden_in + mixed + layer.y.view(3, 41, -1)
        assert (rebuilt - layer.hidden_out).abs().max() <= 1e-4
    assert mine.is_meta is False and stream.hidden_states is not None


def test_routing_stats_equal_brute_force(reference):
    ids = torch.randint(0, reference.config.vocab_size, (4, 33))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    stats = RoutingStats(neurons=True)
    teacher = load_teacher(TINY)
    teacher.run(ids, attention_mask=mask, observers=[stats], logits=False)
    for layer in teacher.stream(ids, attention_mask=mask):
        s, real = stats[layer.index], layer.token_mask
        e_count, k = len(layer.experts), layer.top_k_index.shape[1]
        w = torch.zeros(len(real), e_count).scatter_(1, layer.top_k_index, layer.top_k_weights)[real].double()
        assert int(s.tokens) == int(mask.sum())
        assert torch.allclose(s.alpha, w.mean(0), atol=1e-6)
        assert torch.equal(s.count, (w > 0).sum(0).double()) and float(s.load.sum()) == pytest.approx(k)
        for e in range(e_count):
            hit = w[:, e] > 0
            expert, x = layer.experts[e], layer.x[real][hit]
            f = expert(x).double()
            assert s.reap[e] == pytest.approx(float((w[hit, e] * f.norm(dim=1)).mean()), rel=1e-5)
            assert torch.allclose(s.mean_output[e], f.mean(0), atol=1e-5)
            energy = (expert.hidden(x).double() * w[hit, e, None]).square().sum(0)
            assert torch.allclose(s.neuron_energy[e], energy, rtol=1e-4, atol=1e-8)


def test_nll_on_validation_text(reference, text, tokenizer):
    """Real text through the real tokenizer: the negative log-likelihood equals transformers' to 1e-4."""
    data = load_blocks(text, tokenizer, 256, "valid", tokens=3000)
    teacher = load_teacher(TINY, memory="17MB")
    logits = teacher.run(data.input_ids, data.attention_mask, data.document_ids).logits
    want = torch.cat([reference(ids).logits for ids in data.input_ids.split(4)])

    def nll(scores):
        return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), data.input_ids[:, 1:].flatten()).item()

    assert nll(logits) == pytest.approx(nll(want), abs=1e-4) and 2.5 < nll(logits) < 4.5
    assert teacher.tokenizer().vocab_size == tokenizer.vocab_size


def test_a_script_that_keeps_a_teacher_ends_quietly():
    """Without a traceback from what is cleaned up at exit, and without a deprecation warning of transformers."""
    script = f"""
import torch
import moe2dense as m2d
from moe2dense.teacher.decode import Decoder
teacher = m2d.load_teacher({str(TINY)!r}, memory="30MB")
teacher.run(torch.arange(8)[None])
decoder = Decoder(teacher, [[1, 2, 3], [4, 5]])
decoder.prefill()
decoder.step(torch.tensor([6, 7]))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
