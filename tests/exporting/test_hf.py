"""The transformers layout: every host round-trips, and what is wrong is named."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from moe2dense.errors import UserError
from moe2dense.exporting import hf, verify
from moe2dense.exporting.api import export
from moe2dense.exporting.dialects import older_fields
from moe2dense.families.cards import StudentCard, student_host, teacher_cards
from moe2dense.student.open import open_student
from moe2dense.student.target.dense_config import dense_config
from tests.exporting.conftest import EXAMPLE, HOSTS, tiny
from tests.teacher.families import FAMILIES, make


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_round_trips_exactly_in_fp32(host, tmp_path):
    model = tiny(host, seed=3)
    done = export(model, tmp_path / "m", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is type(model) and again.dtype == torch.float32
    ids = torch.randint(97, (3, 29))
    assert (logits(again, ids) - logits(model, ids)).abs().max() < 1e-5
    assert done.checked["tensors"] == len(model.state_dict())


def say_the_same_twice(folder, model):
    """Check that the older fields of config.json, alone, name the same RoPE and dtype as the newer ones."""
    config = json.loads((folder / "config.json").read_text())
    rope = model.config.rope_parameters
    assert config["torch_dtype"] == config["dtype"]
    if not rope or "full_attention" in rope:  # none, or one for each kind of layer, which the older fields cannot say
        assert "rope_theta" not in config
        return
    assert config["rope_theta"] == rope["rope_theta"] not in (1e4, 1e6)
    assert (config["rope_scaling"] is None) == (rope["rope_type"] == "default" and "mrope_section" not in rope)
    assert config.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    (folder / "older").mkdir()
    (folder / "older" / "config.json").write_text(json.dumps(older))
    again = AutoConfig.from_pretrained(folder / "older")  # transformers 5 still reads them
    assert again.rope_parameters == rope and again.dtype == getattr(torch, config["dtype"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_host_of_every_family_round_trips(family, tmp_path):
    teacher = make(family, tmp_path / "teacher").config.get_text_config()
    host = student_host(teacher_cards()[family].host)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(dense_config(teacher, host, 24)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    export(model, tmp_path / "m", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.randint(3, 101, (2, 17))
    assert (logits(again, ids) - logits(model, ids)).abs().max() < 1e-5
    experts = [name for name in verify.checkpoint_tensors(tmp_path / "m") if "expert" in name]
    assert bool(experts) == host.moe_shaped
    say_the_same_twice(tmp_path / "m", model)
    assert ("- moe-shaped" in (tmp_path / "m/README.md").read_text()) == host.moe_shaped


@pytest.mark.parametrize("host", ["olmoe", "phimoe", "minimax_m2"])
def test_one_expert_has_the_hubs_names_however_the_student_was_loaded(host, tmp_path):
    """A student that was read from tensors named as they are in memory is written with a tensor for each expert's matrix."""
    one = student_host(host).set | ({"head_dim": 8} if host == "minimax_m2" else {})
    export(tiny(host, **one), tmp_path / "hub", dtype="float32")
    model = tiny(host, **one)
    fused = {name: value.contiguous() for name, value in model.state_dict().items()}
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path / "fused")
    student = open_student(str(tmp_path / "fused")).model
    export(student, tmp_path / "m", dtype="float32")
    names, hub = (set(verify.checkpoint_tensors(tmp_path / folder)) for folder in ("m", "hub"))
    assert names == hub and any(".experts.0." in name for name in names) and not any("gate_up" in n for n in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.randint(97, (2, 17))
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_fields_of_the_public_checkpoints_are_written_for_other_programs(tmp_path):
    """vLLM reads them, and transformers does not write them."""
    export(tiny("lfm2"), tmp_path / "lfm2")
    config = json.loads((tmp_path / "lfm2/config.json").read_text())
    assert [config[n] for n in ("block_dim", "conv_dim", "conv_dim_out", "block_ff_dim")] == [24, 24, 24, 40]
    export(tiny("minimax_m2", num_local_experts=1, num_experts_per_tok=1, head_dim=8), tmp_path / "minimax")
    config = json.loads((tmp_path / "minimax/config.json").read_text())
    assert config["scoring_func"] == "softmax" and config["use_routing_bias"] is True


def test_what_a_card_sets_takes_the_place_of_what_the_teacher_had():
    """GLM-4.7-Flash's own config.json says that one layer is dense, which is no longer so; transformers does not read it."""
    config = {"model_type": "glm4_moe_lite", "num_hidden_layers": 4, "first_k_dense_replace": 1, "dtype": "float32"}
    assert older_fields(config) == {"first_k_dense_replace": 4, "torch_dtype": "float32"}
    assert older_fields({"model_type": "phimoe"})["architectures"] == ["PhiMoEForCausalLM"]


@pytest.mark.parametrize("host", ["mistral", "qwen2", "granite", "cohere2"])
def test_bf16_equals_the_student_rounded_to_bf16(host, tmp_path):
    model = tiny(host, seed=4)
    ids = torch.randint(97, (2, 31))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    exact = logits(model, ids)
    export(model, tmp_path / "m")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # the student itself is untouched
    assert model.config.dtype != torch.bfloat16
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32), ids)
    model.load_state_dict({k: v.bfloat16().float() for k, v in before.items()})
    assert (got - logits(model, ids)).abs().max() < 1e-5
    assert 0 < (got - exact).abs().max() < 0.1 * exact.abs().max()  # what bf16 costs


def test_shards_have_a_right_index_and_tied_weights_are_stored_once(tmp_path):
    model = tiny("qwen2")
    export(model, tmp_path / "m", shard_size="8kB", dtype="float16")
    files = sorted((tmp_path / "m").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    stored = {name: file.name for file in files for name in load_file(file)}
    assert len(files) > 2 and stored == index["weight_map"]
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_untied_weights_that_are_equal_stay_two_tensors(tmp_path):
    model = tiny("llama")
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    export(model, tmp_path / "m")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(verify.checkpoint_tensors(tmp_path / "m"))


def test_config_carries_rope_eps_and_multipliers(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 7e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    export(tiny("llama", rope_parameters=rope, rms_norm_eps=7e-6), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 7e-6 and config["rope_parameters"] == rope


def test_tokenizer_generation_defaults_and_license_travel(student, example, tmp_path):
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(example, teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    (teacher / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    (teacher / "LICENSE").write_text("be kind\n")
    (teacher / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# teacher\n")
    settings = {"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": True, "temperature": 0.7}
    (teacher / "generation_config.json").write_text(json.dumps(settings))
    export(student, tmp_path / "m", tokenizer=teacher)
    chat = [{"role": "user", "content": "hello"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user] hello\n"
    defaults = GenerationConfig.from_pretrained(tmp_path / "m")
    assert defaults.eos_token_id == [2, 7] and defaults.temperature == 0.7
    assert (tmp_path / "m/LICENSE").read_text() == "be kind\n"
    assert "license: cc-by-4.0" in (tmp_path / "m/README.md").read_text().split("---")[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (example / name).read_bytes()


def test_plain_transformers_generates_from_it(student, example, tmp_path):
    export(student, tmp_path / "m", tokenizer=example, dtype="float32")
    ids = AutoTokenizer.from_pretrained(example)("Once upon a time", return_tensors="pt").input_ids
    want = student.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = t('Once upon a time', return_tensors='pt').input_ids\n"
        "print(m.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())\n"
        "assert not any('moe2dense' in name for name in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout.splitlines()[-1]) == want
    text = pipeline("text-generation", model=str(tmp_path / "m"))("Once upon a time", max_new_tokens=8, do_sample=False)
    assert text[0]["generated_text"].startswith("Once upon a time")


# ---- what is wrong is named


def written(model, folder, **options):
    folder.mkdir()
    hf.write_model(model, folder, **options)
    return folder


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def nudge(state):
    # one bf16 step in one weight
    w = state["model.layers.1.mlp.up_proj.weight"].view(torch.int16)
    w[3, 5] += 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nudge, "model.layers.1.mlp.up_proj.weight differs"),
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight is not in the checkpoint"),
        (lambda s: s.update(projector=torch.ones(2)), "projector is in the checkpoint but not part"),
        (
            lambda s: s.update({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2)}),
            "experts.0.up_proj.weight belongs to a mixture of experts",
        ),
    ],
)
def test_a_wrong_tensor_is_named(change, named, tmp_path):
    model = tiny("mistral")
    folder = written(model, tmp_path / "m")
    hf.check_model(model, folder)
    edit(folder, change)
    with pytest.raises(verify.VerificationError, match=named):
        hf.check_model(model, folder)


def test_a_config_that_drifts_is_named(tmp_path):
    model = tiny("mistral")
    folder = written(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(verify.VerificationError, match="rms_norm_eps"):
        hf.check_model(model, folder)


def test_a_module_that_no_longer_matches_its_config_is_caught(tmp_path):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5  # not in config.json
    with pytest.raises(verify.VerificationError, match="logits differ"):
        export(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_host_class_that_changes_weights_while_loading_is_caught(tmp_path):
    # Youtu's initialisation zeroes the padding row of the embedding even after loading it.
    with pytest.raises(verify.VerificationError, match=r"model\.embed_tokens\.weight differs"):
        export(tiny("youtu", pad_token_id=2), tmp_path / "m")


def test_an_moe_is_refused_unless_its_card_says_moe_shaped(tmp_path):
    model = tiny("olmoe", num_experts=1, num_experts_per_tok=1)
    with pytest.raises(verify.VerificationError, match="experts"):
        export(model, tmp_path / "m", card=StudentCard("olmoe", "OLMoE", model_type="olmoe"))
    with pytest.raises(UserError, match="num_experts = 4, a dense olmoe has 1"):
        export(tiny("olmoe", num_experts=4, num_experts_per_tok=1), tmp_path / "m")
    export(model, tmp_path / "m")
    card = (tmp_path / "m/README.md").read_text()
    assert "- moe-shaped" in card and "- dense" not in card and student_host("olmoe").notes in card


def test_adapters_nan_and_a_foreign_tokenizer_are_refused(student, example, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    bad = tiny("mistral")
    bad.model.layers[2].mlp.down_proj.weight.data[1, 2] = float("nan")
    with pytest.raises(UserError, match=r"model.layers.2.mlp.down_proj.weight has values that are not finite"):
        export(bad, tmp_path / "m")
    huge = tiny("mistral")
    huge.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"lm_head.weight .* torch.float16"):
        export(huge, tmp_path / "m", dtype="float16")
    with pytest.raises(UserError, match="tokenizer: it has 4096 tokens, the model's vocabulary 97"):
        export(tiny("mistral"), tmp_path / "m", tokenizer=example)
    with pytest.raises(UserError, match="tokenizer: none can be loaded"):
        export(student, tmp_path / "m", tokenizer=tmp_path)
    adapted = tiny("mistral")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)
    with pytest.raises(UserError, match="adapters"):
        export(adapted, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int7"}, "dtype: 'int7'"),
        ({"format": "onnx"}, "format: 'onnx'"),
        ({"quantize": "int3"}, "quantize: 'int3'"),
        ({"info": {"licence": "mit"}}, "info: unknown field 'licence'"),
        ({"shard_size": "big"}, "shard_size must be a number"),
    ],
)
def test_bad_options_are_one_sentence(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(tiny("mistral"), tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="a Student or a transformers model is needed; found dict"):
        export({}, tmp_path / "m")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        export(tiny("mistral", vocab_size=4096), tmp_path / "m", tokenizer=EXAMPLE)
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "m").rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"model.safetensors", "config.json", "README.md"}
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {oct(0o666 & ~umask)}
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~umask
