"""GGUF: what the file holds, and that llama.cpp computes from it what transformers computes from the student."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.exporting.gguf import write as writing
from moe2dense.exporting.gguf.hosts import HOSTS as GGUF_HOSTS
from moe2dense.exporting.gguf.supported import check_supported
from moe2dense.exporting.gguf.tensors import interleave, named_tensors
from moe2dense.exporting.gguf.vocabulary import read_vocabulary, split_rule
from moe2dense.exporting.verify import VerificationError
from moe2dense.families.cards import student_cards
from tests.exporting.conftest import EXAMPLE, HOSTS, tiny
from tests.exporting.llama_cpp import LlamaCpp
from tests.exporting.serving.hosts import HOSTS as SERVED

gguf = pytest.importorskip("gguf")
BIG = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}


def read(path):
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_interleave_turns_halves_into_neighbours():
    heads, d, h = 3, 10, 7
    w, x = torch.randn(heads * d, h, dtype=torch.float64), torch.randn(h, dtype=torch.float64)
    angle = torch.rand(d // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    q = (w @ x).reshape(heads, d)
    a, b = q[:, : d // 2], q[:, d // 2 :]
    halves = torch.cat([a * cos - b * sin, b * cos + a * sin], 1)
    p = (interleave(w, d) @ x).reshape(heads, d)
    even, odd = p[:, ::2], p[:, 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(heads, d)
    assert torch.allclose(halves @ halves.T, pairs @ pairs.T)  # scores do not see the order of the rows
    assert torch.equal(interleave(w[:, 0], d), interleave(w, d)[:, 0])


@pytest.mark.parametrize("host", sorted(set(HOSTS) & set(GGUF_HOSTS)))
def test_every_parameter_has_a_place(host):
    model = tiny(host)
    names = [name for name, _ in named_tensors(model, GGUF_HOSTS[host])]
    apart = (
        model.config.num_hidden_layers if GGUF_HOSTS[host].latent else 0
    )  # keys and values of a latent are two tensors
    assert len(names) == len(set(names)) == len(list(model.parameters())) + apart


@pytest.mark.parametrize(("dtype", "quantize", "kind"), [
    ("float32", None, "f32"), ("float16", None, "f16"), ("bfloat16", None, "bf16"), ("bfloat16", "q8_0", "q8_0"),
])  # fmt: skip
def test_the_file_holds_the_student(dtype, quantize, kind, tmp_path):
    model = tiny("mistral", seed=5, **BIG)
    done = export(model, tmp_path / "g", tokenizer=EXAMPLE, dtype=dtype, format="gguf", quantize=quantize)
    fields, tensors = read(tmp_path / "g" / f"model-{kind}.gguf")
    assert done.checked["tensors"] == len(tensors) == len(list(model.parameters()))
    want = model.model.layers[1].mlp.down_proj.weight.detach()
    stored = tensors["blk.1.ffn_down.weight"]
    got = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()).reshape(want.shape)
    if kind == "q8_0":
        assert 0 < (got - want).abs().max() <= want.abs().max() / 127
    else:
        assert torch.equal(got, want.to(getattr(torch, dtype)).float())
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert fields["general.architecture"] == "llama" and fields["llama.feed_forward_length"] == 96
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-5)
    assert fields["tokenizer.ggml.pre"] == "starcoder" and fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False and fields["tokenizer.ggml.bos_token_id"] == 1


def test_a_row_that_q8_0_cannot_hold_stays_f16(tmp_path):
    model = tiny("llama", **BIG | {"intermediate_size": 40})
    export(model, tmp_path / "g", tokenizer=EXAMPLE, format="gguf", quantize="q8_0")
    kinds = {name: t.tensor_type.name for name, t in read(tmp_path / "g/model-q8_0.gguf")[1].items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_padded_vocabulary_and_chat_template(tmp_path):
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(EXAMPLE, teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    (teacher / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export(tiny("llama", **BIG | {"vocab_size": 4100}), tmp_path / "g", tokenizer=teacher, format="gguf")
    fields, _ = read(tmp_path / "g/model-bf16.gguf")
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert fields["tokenizer.ggml.tokens"][4096:] == ["[PAD4096]", "[PAD4097]", "[PAD4098]", "[PAD4099]"]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1] and fields["tokenizer.ggml.token_type"][-1] == 5


def test_a_changed_file_is_named(tmp_path, monkeypatch):
    stored = writing._stored

    def wrong(package, tensor, kind):
        data = stored(package, tensor, kind).copy()
        if tuple(tensor.shape) == (4096, 64):
            data[7, 3] += 1
        return data

    monkeypatch.setattr(writing, "_stored", wrong)
    with pytest.raises(VerificationError, match=r"tensor token_embd\.weight differs"):
        export(tiny("qwen2", **BIG), tmp_path / "g", tokenizer=EXAMPLE, format="gguf", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_what_gguf_cannot_describe_is_refused(tmp_path):
    def refused(match, model, **options):
        with pytest.raises(UserError, match=match):
            export(model, tmp_path / "g", format="gguf", **{"tokenizer": EXAMPLE, **options})

    refused("does not know the host smollm3", tiny("smollm3", vocab_size=4096))
    huge = tiny("llama", **BIG)
    huge.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    refused(r"tensor blk\.0\.ffn_up\.weight has values that are not finite in F16", huge, dtype="float16")
    refused("pass --tokenizer", tiny("llama", **BIG), tokenizer=None)
    refused("quantize: 'int4' is not known for --format gguf", tiny("llama", **BIG), quantize="int4")
    refused("does not know rope", tiny("llama", **BIG, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))  # fmt: skip
    refused(
        "layer 1 is full_attention", tiny("cohere2", **BIG, layer_types=["sliding_attention"] + ["full_attention"] * 4)
    )
    assert list(tmp_path.iterdir()) == []


BIASES = ("attention_bias", "mlp_bias", "use_bias", "conv_bias")


def with_biases(host, field):
    """A model of the host with these biases, or None where the field gives it none."""
    plain, model = tiny(host, **BIG), tiny(host, **BIG, **{field: True})
    return model if len(model.state_dict()) > len(plain.state_dict()) else None


@pytest.mark.parametrize("host", sorted(set(HOSTS) & set(GGUF_HOSTS)))
def test_an_activation_that_llama_cpp_does_not_compute_is_refused(host):
    for act in ("relu", "gelu", "gelu_pytorch_tanh"):
        if host == "lfm2":  # always silu, whatever the field says
            check_supported(tiny(host, hidden_act=act), GGUF_HOSTS[host])
            continue
        with pytest.raises(UserError, match=f"with silu, whatever the file says; the student's hidden_act is '{act}'"):
            check_supported(tiny(host, hidden_act=act), GGUF_HOSTS[host])
    check_supported(tiny(host, hidden_act="silu"), GGUF_HOSTS[host])


def test_biases_that_llama_cpp_has_no_place_for_are_refused_before_writing(tmp_path):
    refused = set()
    for host in sorted(set(HOSTS) & set(GGUF_HOSTS)):
        for field in BIASES:
            model = with_biases(host, field)
            try:
                if model is not None:
                    check_supported(model, GGUF_HOSTS[host])
            except UserError as error:
                assert "has no biases in" in str(error)
                refused.add((host, field))
    assert refused == {
        ("cohere2", "attention_bias"), ("ernie4_5", "use_bias"), ("hunyuan_v1_dense", "attention_bias"), ("lfm2", "conv_bias"),
        ("olmo2", "attention_bias"), ("qwen3", "attention_bias"), ("youtu", "attention_bias"),
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"llama\.cpp's qwen3 has no biases in q_proj, the student has \(model\.layers\.0"
    ):
        export(with_biases("qwen3", "attention_bias"), tmp_path / "g", tokenizer=EXAMPLE, format="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("field", BIASES)
@pytest.mark.parametrize("host", sorted(set(HOSTS) & set(GGUF_HOSTS)))
def test_biases_are_refused_exactly_where_llama_cpp_does_not_load_them(host, field, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    model = with_biases(host, field)
    if model is None:
        pytest.skip("no such biases")
    try:
        check_supported(model, GGUF_HOSTS[host])
        allowed = True
    except UserError:
        allowed = False
    monkeypatch.setattr(writing, "check_supported", lambda *_: None)
    export(model, tmp_path / "g", tokenizer=EXAMPLE, format="gguf", dtype="float32")
    if not allowed:
        with pytest.raises(RuntimeError):
            LlamaCpp(tmp_path / "g/model-f32.gguf")
        return
    ids = [1, *torch.randint(3, 4096, (20,), generator=torch.Generator().manual_seed(0)).tolist()]
    want, got = log_probs(model, ids)[-1], LlamaCpp(tmp_path / "g/model-f32.gguf").generate(ids, 1, 4096)[1][0]
    assert (got - want).abs().max() < 2e-3 * want.abs().max()


def test_the_cards_claim_llama_cpp_for_exactly_the_hosts_tested_there():
    claimed = {card.model_type for card in student_cards().values() if card.loads.get("llama_cpp") == "seen"}
    assert claimed == set(GGUF_HOSTS) & (set(HOSTS) | set(SERVED))


# ---- tokenizers

PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": None,
    "": r"\p{L}+|\p{N}{2}|[^\p{L}\p{N}]+",  # nobody's
}
TEXTS = [
    "The year 1987, it's WE'LL don't  stop…", "x = f(y)[3];\n\n  # naïve Café 漢字 🙂", " lead", "12345678 ½", "camelCase HTML's\t\tok",
]  # fmt: skip


def byte_level(pattern, ignore_merges=False):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEXTS, "it was the best of times; it was the worst of times 1987 1988\n"] * 3, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece_like():
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    # one word at a time, as sentencepiece trains
    words = [w for t in [*TEXTS[:1], "it was the best of times; it was the worst of times"] for w in t.split()]
    tokenizer.train_from_iterator(words * 3, trainer)
    table = json.loads(tokenizer.to_str())
    table["added_tokens"] = table["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(table))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("rule", ["qwen2", "llama-bpe", "tekken", "gpt-2"])
def test_the_split_rule_is_recognised(rule):
    assert split_rule(byte_level(PATTERNS[rule], ignore_merges=rule in ("llama-bpe", "tekken"))) == rule


def test_an_unknown_split_or_normalizer_is_an_error_not_a_wrong_file(tmp_path):
    with pytest.raises(UserError, match="splits text in a way that GGUF has no name for"):
        export(tiny("llama", **BIG), tmp_path / "g", tokenizer=byte_level(PATTERNS[""]), format="gguf")
    lower = byte_level(None)
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="normalizer \\(Lowercase\\)"):
        read_vocabulary(lower, 500)
    assert list(tmp_path.iterdir()) == []


# ---- llama.cpp itself


def log_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("host", sorted(set(HOSTS) & set(GGUF_HOSTS)))
def test_llama_cpp_computes_what_transformers_computes(host, tmp_path):
    pytest.importorskip("xllamacpp")
    model = tiny(host, seed=6, **{**BIG, "head_dim": 20} if host == "qwen3" else BIG)
    export(model, tmp_path / "g", tokenizer=EXAMPLE, format="gguf", dtype="float32")
    llama = LlamaCpp(tmp_path / "g/model-f32.gguf")
    for length in (2, 7, 33):
        ids = [1, *torch.randint(3, 4096, (length - 1,)).tolist()]
        want = log_probs(model, ids)[-1]
        got = llama.generate(ids, 1, vocabulary=4096)[1][0]
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
        assert got.argmax() == want.argmax()


@pytest.mark.slow
@pytest.mark.parametrize("rope", [
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
])  # fmt: skip
def test_llama_cpp_scales_rope_alike(rope, tmp_path):
    pytest.importorskip("xllamacpp")
    model = tiny("llama", seed=7, **BIG, rope_parameters=rope)
    export(model, tmp_path / "g", tokenizer=EXAMPLE, format="gguf", dtype="float32")
    ids = [1, *torch.randint(3, 4096, (150,)).tolist()]
    want = log_probs(model, ids)[-1]
    got = LlamaCpp(tmp_path / "g/model-f32.gguf").generate(ids, 1, vocabulary=4096)[1][0]
    assert (got - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["starcoder", "qwen2", "llama-bpe", "tekken", "gpt-2", "sentencepiece"])
def test_llama_cpp_tokenizes_alike(kind, tmp_path):
    pytest.importorskip("xllamacpp")
    if kind == "starcoder":
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    elif kind == "sentencepiece":
        tokenizer = sentencepiece_like()
    else:
        tokenizer = byte_level(PATTERNS[kind], ignore_merges=kind in ("llama-bpe", "tekken"))
    export(tiny("llama", **BIG), tmp_path / "g", tokenizer=tokenizer, format="gguf")
    llama = LlamaCpp(tmp_path / "g/model-bf16.gguf")
    for text in TEXTS:
        assert llama.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.mark.slow
def test_greedy_tokens_of_twenty_prompts_and_the_cost_of_q8_0(tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    model = tiny("mistral", seed=8, **BIG)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    lines = (EXAMPLE.parent / "text" / "test.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["text"][:60])["input_ids"] for line in lines[:20]]
    assert len(prompts) == 20
    export(model, tmp_path / "f32", tokenizer=EXAMPLE, format="gguf", dtype="float32")
    export(model, tmp_path / "q8", tokenizer=EXAMPLE, format="gguf", quantize="q8_0")
    exact = LlamaCpp(tmp_path / "f32/model-f32.gguf")
    for ids in prompts:
        want = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        got, rows = exact.generate(ids, 12, vocabulary=4096)
        assert got == want[: len(got)] and (len(got) == 12 or want[len(got)] == 2)
        assert (rows[0] - log_probs(model, ids)[-1]).abs().max() < 1e-2
    small = LlamaCpp(tmp_path / "q8/model-q8_0.gguf")
    kl = []
    for ids in prompts:
        p, q = log_probs(model, ids)[-1], small.generate(ids, 1, vocabulary=4096)[1][0]
        kl.append((p.exp() * (p - q)).sum().item())
    with capsys.disabled():
        print(f"\nq8_0 in llama.cpp against the f32 student: KL {np.mean(kl):.2e} nats/token")
    assert 0 <= np.mean(kl) < 0.01
