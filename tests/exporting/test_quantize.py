"""Quantised weights: the rounding against its definition, the files against transformers, the cost against the threshold."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.errors import UserError
from moe2dense.exporting import quantize
from moe2dense.exporting.api import export
from moe2dense.exporting.gptq import round_weight, search_scales
from moe2dense.exporting.verify import VerificationError, checkpoint_tensors
from moe2dense.families.cards import student_host
from tests.distillation.test_adapters import HOSTS as HOSTS_OF_FAMILIES
from tests.distillation.test_adapters import host_model
from tests.exporting.conftest import EXAMPLE, tiny

pytest.importorskip("compressed_tensors")
FIELDS = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}


def correlated(tokens, width, seed=0):
    mixing = torch.randn(width // 2, width, generator=torch.Generator().manual_seed(17))  # the same for every seed
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width // 2, generator=g) @ mixing + 0.1 * torch.randn(tokens, width, generator=g)


def by_definition(weight, gram, scale, group, bits):
    """Optimal brain quantisation with GPTQ's order, from scratch at every column, in fp64."""
    w, h = weight.double().clone(), gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = gram.diagonal().argsort(descending=True).tolist()
    top = 2 ** (bits - 1) - 1
    codes = torch.zeros_like(w)
    while left:
        i = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        s = scale[:, i // group].double()
        codes[:, i] = (w[:, i] / s).round().clamp(-top - 1, top)
        w[:, left] -= torch.outer(w[:, i] - codes[:, i] * s, inverse[0]) / inverse[0, 0]
        left = left[1:]
    return codes


@pytest.mark.parametrize(("bits", "group", "block"), [(4, 8, 128), (4, 24, 5), (8, 4, 7)])
def test_rounding_follows_the_definition(bits, group, block):
    torch.manual_seed(bits)
    weight, x = torch.randn(11, 24, dtype=torch.float64), correlated(300, 24).double()
    gram = x.T @ x / 300
    got = round_weight(weight, gram, bits, group, torch.float32, block)
    want = by_definition(weight, gram, got.scale, group, bits)
    assert torch.equal(got.codes.double(), want)
    again = got.codes.double() * got.scale.double().repeat_interleave(group, 1)
    assert torch.allclose(got.weight().double(), again)


def test_it_beats_rounding_to_nearest_on_new_text():
    torch.manual_seed(1)
    weight, x, fresh = torch.randn(40, 64), correlated(2000, 64, 1), correlated(500, 64, 2)
    gram = x.T @ x / len(x)
    ours = round_weight(weight, gram, 4, 32).weight()
    scale = (weight.reshape(40, 2, 32).abs().amax(-1) / 7.5).repeat_interleave(32, 1)
    nearest = (weight / scale).round().clamp(-8, 7) * scale

    def error(w):
        return ((fresh @ (w - weight).T) ** 2).mean().item()

    assert error(ours) < 0.5 * error(nearest)


def test_an_input_that_calibration_never_saw_keeps_its_weight():
    torch.manual_seed(2)
    x = correlated(100, 16)
    x[:, [3, 9]] = 0
    weight = torch.randn(5, 16)
    got = round_weight(weight, x.T @ x / 100, 8, 16)
    assert torch.isfinite(got.weight()).all()
    assert (got.weight() - weight)[:, [3, 9]].abs().max() < 0.51 * got.scale.float().max()
    dead = round_weight(weight, torch.zeros(16, 16), 8, 16)
    assert (dead.weight() - weight).abs().max() < 0.51 * dead.scale.float().max()


def test_scales_are_what_their_dtype_can_hold():
    scale = search_scales(torch.randn(3, 8), torch.ones(8), 4, 4, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float()) and scale.shape == (3, 2) and (scale > 0).all()


def text(blocks=12, length=48, seed=0):
    return torch.randint(3, 4096, (blocks, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("host", ["mistral", "qwen2", "qwen3", "granite", "lfm2", "olmo2", "cohere2"])
def test_every_kind_of_host_reloads(host, tmp_path, capsys):
    model = tiny(host, seed=9, **FIELDS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    eight = export(model, tmp_path / "8", quantize="int8", text=text(), max_kl=9).quantized["kl"]
    four = export(model, tmp_path / "4", quantize="int4", text=text(), max_kl=9).quantized["kl"]
    with capsys.disabled():
        print(f"\n{host} (random weights): KL of int8 {eight:.2e}, of int4 {four:.2e} nats/token")
    assert 0 < eight < 0.01
    assert eight < four / 10
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "4", dtype=torch.float32)
    held_out = text()[6:]
    assert quantize.divergence(model, plain, held_out) == pytest.approx(four, rel=0.2)


def test_the_card_states_the_cost_and_a_score_gets_a_row(tmp_path):
    model = tiny("mistral", **FIELDS)
    seen = []

    def score(quantised):
        seen.append(quantised)
        return {"kl": {"value": 0.25, "low": 0.2, "high": 0.3}, "nll": 3.0, "teacher_nll": 2.5}

    done = export(
        model, tmp_path / "m", tokenizer=EXAMPLE, quantize="int4", text=text(), max_kl=9, score=score,
        info={"rows": [{"name": "student", "scores": {"kl": 0.2, "nll": 2.9, "teacher_nll": 2.5}}]},
    )  # fmt: skip
    card = (tmp_path / "m/README.md").read_text()
    assert f"{done.quantized['kl']:.4f} nats per token" in card
    assert "| student, int4 | 0.25 [0.2, 0.3] | 3 |" in card and "| student | 0.2 | 2.9 |" in card
    assert seen[0](input_ids=text()[:1]).logits.isfinite().all()
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "m").iterdir()}
    assert sizes["model.safetensors"] == done.files["model.safetensors"] < 2 * model.num_parameters()
    names = checkpoint_tensors(tmp_path / "m")
    assert "model.layers.2.mlp.down_proj.weight_packed" in names and "lm_head.weight" in names
    assert "model.layers.2.mlp.down_proj.weight" not in names


def test_transformers_alone_generates_from_it(tmp_path):
    export(tiny("llama", **FIELDS), tmp_path / "m", tokenizer=EXAMPLE, quantize="int8", text=text())
    script = (
        "import sys; from transformers import pipeline\n"
        "print(len(pipeline('text-generation', model=sys.argv[1])('Once', max_new_tokens=5)[0]['generated_text']))\n"
        "assert not any('moe2dense' in name for name in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    assert int(run.stdout.split()[-1]) > 4


def test_odd_widths_get_one_scale_per_row(tmp_path):
    model = tiny("mistral", **FIELDS | {"intermediate_size": 100})
    export(model, tmp_path / "m", quantize="int8", text=text())
    weights = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ]
    assert weights["strategy"] == "channel"


def test_too_much_lost_is_refused_with_the_number(tmp_path):
    model = tiny("mistral", **FIELDS)
    with pytest.raises(UserError, match=r"int4 moves the student by 0\.\d+ nats per token, more than max_kl = 0.001"):
        export(model, tmp_path / "m", quantize="int4", text=text(), max_kl=0.001)
    with pytest.raises(UserError, match="text of at least two blocks"):
        export(model, tmp_path / "m", quantize="int4", text=text(1))
    with pytest.raises(UserError, match="pass --data"):
        export(model, tmp_path / "m", quantize="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_code_is_named(tmp_path, monkeypatch):
    packed = quantize.packed_state

    def wrong(model, rounded, bits):
        state = packed(model, rounded, bits)
        state["model.layers.0.self_attn.v_proj.weight_packed"][2, 1] ^= 1 << 13
        return state

    monkeypatch.setattr(quantize, "packed_state", wrong)
    with pytest.raises(VerificationError, match=r"tensor model\.layers\.0\.self_attn\.v_proj\.weight differs"):
        export(tiny("mistral", **FIELDS), tmp_path / "m", quantize="int4", text=text(), max_kl=9)
    assert list(tmp_path.iterdir()) == []


def test_statistics_in_several_passes_are_the_same(monkeypatch):
    model = tiny("mistral", **FIELDS)
    layers = quantize.linear_layers(model)
    whole = dict(quantize.quantized_layers(model, layers, text(4), 4, 64))
    monkeypatch.setattr(quantize, "GRAM_BYTES", 4 * 64 * 64 * 3)
    parts = dict(quantize.quantized_layers(model, layers, text(4), 4, 64))
    assert whole.keys() == parts.keys() == layers.keys() and len(layers) == 21
    assert all(torch.equal(whole[n].codes, parts[n].codes) for n in whole)


ONE_EXPERT = sorted(name for name in HOSTS_OF_FAMILIES if student_host(name).moe_shaped)


@pytest.mark.parametrize("host", ONE_EXPERT)
def test_a_host_that_keeps_its_ffn_as_experts_is_refused_before_anything_is_computed(host, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "quantized_layers", lambda *_: pytest.fail("weights were rounded"))
    model = host_model(host)
    with pytest.raises(
        UserError, match=r"of the weights of \w+'s layers are no linear layers \((mlp\.)?experts\.\w+\)"
    ):
        export(model, tmp_path / "m", quantize="int4", text=text(), card=student_host(host))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", sorted(set(HOSTS_OF_FAMILIES) - set(ONE_EXPERT)))
def test_every_other_host_has_all_its_matrices_rounded(host):
    # of a real Mamba layer its states' decay is a thousandth
    quantize.check_layers(host_model(host, mamba_d_state=1))


def test_matrices_left_in_16_bits_are_counted_on_disk(tmp_path, monkeypatch):
    packed = quantize.packed_state

    def forgotten(model, rounded, bits):
        return packed(model, {n: r for n, r in rounded.items() if "mlp" not in n}, bits)

    monkeypatch.setattr(quantize, "packed_state", forgotten)
    with pytest.raises(UserError, match=r"quantize: 8\d% of the layers' bytes are not int4 after writing"):
        export(tiny("mistral", **FIELDS), tmp_path / "m", quantize="int4", text=text(), max_kl=9)
    assert list(tmp_path.iterdir()) == []
