"""The example teacher, converted and exported: generate in transformers, the same tokens in llama.cpp, the cost of few bits."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from moe2dense.data.load import load_blocks
from moe2dense.exporting import quantize
from moe2dense.exporting.api import export
from moe2dense.student.build.api import build_student
from moe2dense.student.target.resolve import resolve_target
from moe2dense.teacher.load import load_teacher
from tests.exporting.conftest import EXAMPLE
from tests.exporting.llama_cpp import LlamaCpp

TEXT = EXAMPLE.parent / "text"


@pytest.fixture(scope="module")
def converted():
    teacher = load_teacher(EXAMPLE)
    blocks = load_blocks(TEXT, teacher.tokenizer(), 128, "train", tokens=8192)
    target = resolve_target("3.2m", teacher.config, teacher.card)
    return build_student(teacher, to=target, data=blocks, init="select+refit")


@pytest.fixture(scope="module")
def held_out():
    return load_blocks(TEXT, AutoTokenizer.from_pretrained(EXAMPLE), 128, "valid", tokens=4096).input_ids


def prompts(count, characters=60):
    lines = (TEXT / "test.jsonl").read_text().splitlines()[:count]
    return [json.loads(line)["text"][:characters] for line in lines]


def test_transformers_loads_it_without_this_project(converted, tmp_path):
    export(converted, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(model).__name__ == "MistralForCausalLM" and model.config.intermediate_size == 512
    ids = tokenizer(prompts(1)[0], return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 10
    said = pipeline("text-generation", model=str(tmp_path / "m"))(prompts(1)[0], max_new_tokens=10, do_sample=False)
    assert said[0]["generated_text"].startswith(prompts(1)[0])
    card = (tmp_path / "m/README.md").read_text()
    assert "tiny-mixtral" in card and "select+refit" in card


def test_few_bits_reload_and_say_their_cost(converted, held_out, tmp_path, capsys):
    pytest.importorskip("compressed_tensors")
    eight = export(converted, tmp_path / "8", quantize="int8", text=held_out)
    four = export(converted, tmp_path / "4", quantize="int4", text=held_out, max_kl=0.5)
    with capsys.disabled():
        for name, done in (("int8", eight), ("int4", four)):
            size = done.files["model.safetensors"] / 1e6
            print(f"\ntiny-mixtral as 3.2m, {name}: {size:.2f} MB, KL {done.quantized['kl']:.2e} nats/token")
    assert eight.quantized["kl"] < 0.005 and eight.quantized["kl"] < four.quantized["kl"] < 0.2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "8", dtype=torch.float32)
    assert quantize.divergence(converted.model, again, held_out[-4:]) < 0.005


@pytest.mark.slow
def test_llama_cpp_says_the_same(converted, held_out, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    export(converted, tmp_path / "f32", format="gguf", dtype="float32")
    export(converted, tmp_path / "q8", format="gguf", quantize="q8_0")
    exact, small = LlamaCpp(tmp_path / "f32/model-f32.gguf"), LlamaCpp(tmp_path / "q8/model-q8_0.gguf")
    worst, kl = 0.0, []
    for text in prompts(20):
        ids = tokenizer(text)["input_ids"]
        assert exact.tokenize(text) == ids
        with torch.no_grad():
            want = converted.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            tokens = converted.model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
        got, rows = exact.generate(ids, 16, vocabulary=4096)
        worst = max(worst, (rows[0] - want).abs().max().item())
        assert got == tokens.tolist()
        kl.append((want.exp() * (want - small.generate(ids, 1, vocabulary=4096)[1][0])).sum().item())
    with capsys.disabled():
        print(
            f"\nllama.cpp f32: largest log-probability difference {worst:.1e}; q8_0: KL {sum(kl) / 20:.2e} nats/token"
        )
    assert worst < 1e-3 and 0 <= sum(kl) / 20 < 0.005
