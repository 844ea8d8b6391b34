"""Every family: its dense host saves, reloads in plain transformers, and reproduces a teacher whose experts are identical."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.families.cards import student_cards, student_host, teacher_cards
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import FAMILIES, YARN, blocks, make

SHORT = BuildConfig(
    local_steps=8, local_batch=16, layer_steps=4, layer_batch=46, heal_epochs=1, heal_batch=46, hold_out=0.3
)
# Where a token's weights add up to no constant, identical experts leave a residual error; a norm behind the block takes it away.
VARYING = {
    n for n, c in teacher_cards().items() if c.weights_sum == "varies" and student_host(c.host).join != "post_norm"
}


def target_for(teacher, width: int = 0, host: str = "") -> Target:
    card = student_host(host or teacher.card.host)
    shape = teacher_geometry(teacher.config, teacher.card)
    width = width or max(shape.expert_width + shape.shared_width, shape.dense_width)
    config = dense_config(teacher.config.get_text_config(), card, width)
    return Target("test", "test", card, width, config, 0, shape)


def identical(model) -> None:
    """Every routed expert becomes a copy of its layer's first."""
    for name, value in model.named_parameters():
        if ".experts." in name and value.dim() > 1:
            value.copy_(value[:1].expand_as(value).clone())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_identical_experts_give_the_teachers_logits(family, tmp_path):
    model = make(family, tmp_path / "t")
    identical(model)
    if hasattr(model.model.layers[-1], "mlp") and hasattr(model.model.layers[-1].mlp, "shared_expert_gate"):
        for layer in model.model.layers:
            if hasattr(layer.mlp, "shared_expert_gate"):
                layer.mlp.shared_expert_gate.weight.zero_()  # a constant gate of one half folds exactly
    model.save_pretrained(tmp_path / "same")
    teacher = load_teacher(tmp_path / "same", experts="streamed")
    ids = blocks(model)
    student = build_student(teacher, to=target_for(teacher), data=Blocks(ids), init="weighted-average")
    with torch.no_grad():
        want, got = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, student.model))
    error = float((want - got).abs().max())
    if family in VARYING:
        assert 1e-4 < error < 1e3, f"{family}: weights that vary cannot be folded exactly, yet the error is {error}"
        return
    assert error < 2e-3, f"{family}: log-probabilities differ by {error}"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_built_student_reloads_in_plain_transformers(family, tmp_path):
    model = make(family, tmp_path / "t")
    teacher = load_teacher(tmp_path / "t", experts="streamed")
    ids = blocks(model)
    width = target_for(teacher).width + 3
    student = build_student(
        teacher, to=target_for(teacher, width), data=Blocks(ids), init="obs+refit+local+layer", config=SHORT
    )
    assert not any(p.is_meta for p in student.model.parameters()) and all(
        p.requires_grad for p in student.model.parameters()
    )
    for record in student.history:
        if "local_after" in record:
            assert record["local_after"] <= record["local_before"] and record["layer_after"] <= record["layer_before"]
    student.model.save_pretrained(tmp_path / "s")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    if student.card.moe_shaped:
        plain.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, student.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    dense = {n for n in plain.state_dict() if ".experts." in n or "router" in n}
    assert bool(dense) == student.card.moe_shaped


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("rope", [{}, {"mscale": 1.0, "mscale_all_dim": 0.7}])
def test_latent_attention_in_a_dense_architecture(family, rope, tmp_path):
    """Youtu in place of the family's own dense form: rotary pairs, low ranks and YaRN's scale are the teacher's."""
    changes = {"num_experts_per_tok": 6, "topk_group": 3} if family == "deepseek_v2" else {}
    if rope:
        changes["rope_parameters"] = {**YARN, **rope}
    model = make(family, tmp_path / "t", **changes)
    identical(model)
    model.save_pretrained(tmp_path / "same")
    teacher, ids = load_teacher(tmp_path / "same", experts="streamed"), blocks(model)
    student = build_student(teacher, target_for(teacher, host="youtu"), Blocks(ids), init="weighted-average")
    student.model.save_pretrained(tmp_path / "s")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    assert type(plain).__name__ == "YoutuForCausalLM"
    with torch.no_grad():
        want, own, got = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, student.model, plain))
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
    assert float((want - got).abs().max()) < 2e-3


ONE_EXPERT = {"olmoe", "gpt_oss", "minimax", "minimax_m2", "phimoe", "gemma4_text"}
HOSTS = {
    "mistral", "llama", "qwen2", "qwen3", "olmo2", "granite", "ernie4_5", "hunyuan_v1_dense", "lfm2", "cohere2", "youtu",
    "deepseek_v2", "deepseek_v3", "glm4_moe", "llama4_text", "qwen3_next", "olmoe", "gpt_oss", "minimax_m2", "phimoe",
    "qwen3_5_text", "glm4_moe_lite", "laguna", "mimo_v2_flash", "hy_v3", "deepseek_v32", "bailing_hybrid", "afmoe", "exaone_moe",
    "mellum", "granitemoehybrid", "granite_swa", "jamba", "minimax", "minimax_m3_vl_text", "gemma4_text",
}  # fmt: skip


def test_every_host_is_there_and_says_what_it_is():
    cards = {name: card for name, card in student_cards().items() if not card.host}
    assert cards.keys() >= HOSTS
    assert {n for n, c in cards.items() if c.moe_shaped} == ONE_EXPERT
    for name, card in cards.items():
        assert {"transformers", "vllm", "llama_cpp"} <= card.loads.keys(), name
        assert all(v in ("seen", "documented") or v.startswith("no: ") for v in card.loads.values()), name


def test_every_family_has_a_host_and_every_host_says_what_loads_it():
    for card in teacher_cards().values():
        assert student_host(card.host).loads, card.model_type
    assert all(card.loads for card in student_cards().values() if not card.host)
