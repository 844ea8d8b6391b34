"""The build on small teachers: exactness, masks, resuming, errors, and its order of merit on the trained example."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe2dense.config.schema import BuildConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.families.cards import student_host
from moe2dense.modeling.shape import teacher_geometry
from moe2dense.student.build.api import build_student
from moe2dense.student.build.layer import choose_held_out
from moe2dense.student.build.layer_runner import LayerRunner
from moe2dense.student.ffn.dense import dense
from moe2dense.student.ffn.make import make_ffn
from moe2dense.student.ffn.randomized import random_ffn
from moe2dense.student.ffn.task import FFNTask
from moe2dense.student.footprint import pool_bytes, pool_limit
from moe2dense.student.target.dense_config import dense_config
from moe2dense.student.target.resolve import Target
from moe2dense.student.types import MIXED, NEW, SHARED
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.model import masks
from moe2dense.teacher.routing import LayerStats
from tests.teacher.families import BASE, blocks, make

SHORT = BuildConfig(
    local_steps=30, local_batch=64, layer_steps=8, layer_batch=64, heal_epochs=1, heal_batch=64, hold_out=0.25
)
METHODS = (
    "random", "average", "weighted-average", "aligned-average", "svd", "concat", "cluster", "select", "obs", "select+refit",
    "obs+refit", "obs+refit+local", "layerwise",
)  # fmt: skip


def target_for(teacher, width: int) -> Target:
    card = student_host(teacher.card.host)
    config = dense_config(teacher.config, card, width)
    return Target("test", "test", card, width, config, 0, teacher_geometry(teacher.config, teacher.card))


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    p, q = (x.double().log_softmax(-1) for x in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", ["cohere2", "granite", "olmo2", "mistral"])
@pytest.mark.parametrize("packing", ["plain", "padded", "packed"])
def test_carried_states_are_those_of_the_models_own_forward(model_type, packing):
    torch.manual_seed(1)
    changes = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4} if model_type == "granite" else {}
    config = AutoConfig.for_model(model_type, **BASE, **changes, intermediate_size=13)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = blocks(model, n=5, s=11)
    mask = documents = None
    if packing == "padded":
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
    if packing == "packed":
        documents = (torch.arange(11) >= 4).long().expand_as(ids)
    want_mask, positions = masks(type("T", (), {"card": None})(), ids, mask, documents)  # type: ignore[arg-type]
    runner = LayerRunner(model, student_host(model_type), ids, want_mask, positions)
    runner.chunks = lambda: [slice(0, 2), slice(2, 5)]
    hidden = runner.embed()
    want = model.model(
        ids, attention_mask=want_mask, position_ids=positions, output_hidden_states=True, use_cache=False
    )
    for index in range(config.num_hidden_layers):
        torch.testing.assert_close(hidden, want.hidden_states[index], rtol=1e-4, atol=1e-5)
        x, rest = runner.before_ffn(index, hidden)
        out = runner.run(index, hidden)
        if student_host(model_type).join != "post_norm":
            joined = rest + runner.multiplier() * runner.ffn(index)(x)
            torch.testing.assert_close(out, joined, rtol=1e-4, atol=1e-5)
        hidden = out
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(model.model.norm(hidden)[real], want.last_hidden_state[real], rtol=1e-4, atol=1e-5)


def test_all_neurons_of_uniformly_routed_experts_are_the_teacher(tmp_path):
    """Every expert chosen with equal weight: the student with all E * F neurons computes the same, whichever way it is made."""
    model = make("mixtral", tmp_path / "t", num_experts_per_tok=5)
    for layer in model.model.layers:
        layer.mlp.gate.weight.zero_()
    model.save_pretrained(tmp_path / "u")
    teacher, ids = load_teacher(tmp_path / "u", experts="streamed"), blocks(model)
    for init in ("select", "obs", "obs+refit", "concat"):
        student = build_student(teacher, target_for(teacher, 5 * 13), Blocks(ids), init=init)
        torch.testing.assert_close(student.model(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize("width", [7, 13, 20, 26])
def test_every_method_at_every_width_fills_every_tensor(init, width, tmp_path):
    model = make("mixtral", tmp_path)
    teacher, ids = load_teacher(tmp_path, experts="streamed"), blocks(model, n=6, s=16)
    student = build_student(teacher, target_for(teacher, width), Blocks(ids), init=init, config=SHORT)
    assert student.build_tokens == 96 and student.method == init and len(student.provenance) == 3
    assert torch.isfinite(student.model(ids).logits).all()
    for provenance in student.provenance:
        assert provenance is not None and len(provenance.source_expert) == len(provenance.source_neuron) == width
        assert (provenance.energy_kept <= provenance.energy_total * (1 + 1e-5)).all() and (
            provenance.energy_kept >= 0
        ).all()
        kinds = set(provenance.source_expert[provenance.source_expert < 0].tolist())
        assert kinds <= {NEW, MIXED} and (provenance.source_neuron[provenance.source_expert >= 0] >= 0).all()


def test_shared_experts_come_first_and_unscaled(tmp_path):
    model = make("deepseek_v3", tmp_path)
    teacher, ids = load_teacher(tmp_path, experts="streamed"), blocks(model)
    student = build_student(teacher, target_for(teacher, 19 + 5), Blocks(ids), init="select")
    layer, built = model.model.layers[1].mlp.shared_experts, student.model.model.layers[1].mlp
    shared = layer.gate_proj.weight.shape[0]
    torch.testing.assert_close(built.down_proj.weight[:, :shared], layer.down_proj.weight)
    assert student.provenance[1] is not None and (student.provenance[1].source_expert == SHARED).sum() == shared
    assert student.provenance[0] is None  # the first layer is dense: kept and padded with neurons that write zero
    own = model.model.layers[0].mlp
    torch.testing.assert_close(student.model.model.layers[0].mlp.down_proj.weight[:, :19], own.down_proj.weight)
    assert not student.model.model.layers[0].mlp.down_proj.weight[:, 19:].any()


def test_padding_does_not_change_the_student(tmp_path):
    model = make("mixtral", tmp_path)
    teacher, ids = load_teacher(tmp_path, experts="streamed"), blocks(model, n=4, s=16)
    wide = torch.cat([ids, torch.full((4, 5), 7)], 1)
    mask = torch.ones_like(wide).bool()
    mask[:, 16:] = False
    one, other = (
        build_student(teacher, target_for(teacher, 20), data, init="obs+refit+local", config=SHORT)
        for data in (Blocks(ids), Blocks(wide, attention_mask=mask))
    )
    assert other.build_tokens == 64
    torch.testing.assert_close(one.model(ids).logits, other.model(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_build_resumes_at_the_last_finished_layer(tmp_path):
    model = make("mixtral", tmp_path / "t")
    teacher, data = load_teacher(tmp_path / "t", experts="streamed"), Blocks(blocks(model))
    target, out = target_for(teacher, 20), tmp_path / "build"
    whole = build_student(teacher, target, data, init="layerwise", config=SHORT)
    built: list[int] = []

    def stop(_: str, done: int, *__: object, **___: object) -> None:
        built.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_student(teacher, target, data, init="layerwise", config=SHORT, out=out, progress=stop)
    assert sorted(p.name for p in out.iterdir()) == ["layer-0000.safetensors", "layer-0001.safetensors"]
    stamp = (out / "layer-0001.safetensors").stat().st_mtime_ns
    again = build_student(teacher, target, data, init="layerwise", config=SHORT, out=out)
    assert (out / "layer-0001.safetensors").stat().st_mtime_ns == stamp
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert again.provenance[0] is not None and torch.equal(
        again.provenance[0].source_expert, whole.provenance[0].source_expert
    )
    with pytest.raises(UserError, match="another teacher, data or settings"):
        build_student(teacher, target, data, init="layerwise", config=dataclasses.replace(SHORT, ridge=0.1), out=out)
    make("mixtral", tmp_path / "other", seed=1)
    other = load_teacher(tmp_path / "other", experts="streamed")
    with pytest.raises(UserError, match="another teacher, data or settings"):
        build_student(other, target, data, init="layerwise", config=SHORT, out=out)
    (out / "layer-0000.safetensors").write_bytes(b"half a layer")
    with pytest.raises(
        UserError, match="layer-0000.safetensors cannot be read: .*; remove it to build that layer again"
    ):
        build_student(teacher, target, data, init="layerwise", config=SHORT, out=out)


def test_errors_name_what_is_wrong(tmp_path):
    make("gpt_oss", tmp_path)
    teacher = load_teacher(tmp_path, experts="streamed")
    data = Blocks(torch.full((2, 8), 5))
    wrong = dataclasses.replace(
        target_for(teacher, 12),
        card=student_host("qwen3"),
        config=dense_config(teacher.config, student_host("llama"), 12),
    )
    with pytest.raises(UserError, match="sinks"):
        build_student(teacher, wrong, data)
    with pytest.raises(UserError, match="no known method"):
        build_student(teacher, target_for(teacher, 12), data, init="best")
    with pytest.raises(UserError, match="no step"):
        build_student(teacher, target_for(teacher, 12), data, init="obs+luck")
    with pytest.raises(UserError, match="no blocks"):
        build_student(teacher, target_for(teacher, 12), Blocks(torch.zeros(0, 8, dtype=torch.int64)))


def test_held_out_blocks():
    assert (
        choose_held_out(1, 0.1, 0).sum() == 0
        and choose_held_out(2, 0.1, 0).sum() == 1
        and choose_held_out(100, 0.06, 3).sum() == 6
    )
    assert torch.equal(choose_held_out(50, 0.1, 1), choose_held_out(50, 0.1, 1)) and not torch.equal(
        choose_held_out(50, 0.1, 1), choose_held_out(50, 0.1, 2)
    )


@pytest.mark.slow
def test_the_order_of_merit_on_the_trained_teacher(tiny, text, tokenizer):
    """random >> concat >> obs+refit > + local > + heal, on held-out text, after 6k tokens and short fits."""
    teacher = load_teacher(tiny)
    data = load_blocks(text, tokenizer, 64, "train", tokens=6_144)
    valid = load_blocks(text, tokenizer, 64, "valid", tokens=2_048)
    want = teacher.run(valid.input_ids).logits
    short = BuildConfig(local_steps=60, local_batch=512, layer_steps=0, heal_epochs=2, heal_batch=512, gram_tokens=4096)
    divergences = {}
    for init in ("random", "concat", "obs+refit", "obs+refit+local", "obs+refit+local+heal"):
        student = build_student(teacher, "3.2m", data, init=init, config=short)
        with torch.no_grad():
            divergences[init] = kl(want, student.model(valid.input_ids).logits)
    values = list(divergences.values())
    assert values == sorted(values, reverse=True), divergences
    assert divergences["random"] > 4 and divergences["concat"] > 1.5 * divergences["obs+refit"], divergences


def test_elimination_works_on_the_neurons_of_most_energy_when_memory_is_short(tmp_path):
    """A pool of every neuron is the whole problem; a smaller one holds the neurons that `select` ranks first."""
    generator = torch.Generator().manual_seed(0)
    experts = [random_ffn(9, 5, 1.0, seed=e) for e in range(4)]
    stats = LayerStats.zeros(4, 5, 9)
    stats.tokens += 60
    stats.weight += 60 * torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert stats.neuron_energy is not None
    stats.neuron_energy += torch.rand(4, 9, generator=generator)
    x = torch.randn(60, 5, generator=generator)
    target = sum(a * f(x) for a, f in zip((0.4, 0.3, 0.2, 0.1), experts, strict=True))
    task = FFNTask(12, 5, x, target, [], experts, stats)

    def chosen(limit: int, base: str = "obs", width: int = 12) -> set[tuple[int, int]]:
        _, provenance = make_ffn(dataclasses.replace(task, pool_limit=limit, width=width), base)
        assert provenance is not None
        return set(zip(provenance.source_expert.tolist(), provenance.source_neuron.tolist(), strict=True))

    assert chosen(0) == chosen(36) == chosen(999) and len(chosen(0)) == 12
    assert chosen(20) <= chosen(0, "select", 20) and chosen(20) != chosen(0, "select")
    assert chosen(12) == chosen(0, "select")
    fits = pool_limit(20_000_000, 10, 64)
    assert pool_bytes(fits, 64) <= 20_000_000 < pool_bytes(fits + 1, 64) and pool_limit(0, 77, 64) == 77


def test_a_pretrained_sibling_keeps_its_weights_and_needs_the_same_tokenizer(tiny, tmp_path, tokenizer):
    teacher = load_teacher(tiny)
    config = AutoConfig.for_model("mistral", vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    data = Blocks(torch.full((1, 8), 5))
    student = build_student(teacher, str(tmp_path), data)
    assert student.build_tokens == 0 and student.method == "checkpoint" and student.provenance == [None, None]
    for (name, a), b in zip(model.named_parameters(), student.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    tokenizer.save_pretrained(tmp_path)
    build_student(teacher, str(tmp_path), data)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens([f"<new{i}>" for i in range(60)])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        build_student(teacher, str(tmp_path), data)


def test_half_precision_passes_are_built_from_in_float32(tmp_path):
    """What a GPU streams is bf16; the student is built in float32 from it, near what it is built from float32."""
    make("qwen2_moe", tmp_path)
    data = Blocks(torch.randint(3, 101, (6, 16), generator=torch.Generator().manual_seed(1)))
    built = {}
    for dtype in (torch.float32, torch.bfloat16):
        teacher = load_teacher(tmp_path, experts="streamed")
        plain = teacher.stream

        def in_precision(*args, plain=plain, dtype=dtype, **kwargs):
            return map(lambda layer_pass: rounded(layer_pass, dtype), plain(*args, **kwargs))

        teacher.stream = in_precision
        built[dtype] = build_student(teacher, target_for(teacher, 24), data, init="select+refit", config=SHORT)
    for half, exact in zip(*(built[d].model.parameters() for d in (torch.bfloat16, torch.float32)), strict=True):
        assert half.dtype == torch.float32 and float((half - exact).norm()) < 0.1 * float(exact.norm()) + 1e-3


def rounded(layer_pass, dtype):
    """A layer's pass with hidden states in another precision."""
    states = {name: getattr(layer_pass, name).to(dtype) for name in ("hidden_in", "hidden_out", "x", "y")}
    return dataclasses.replace(layer_pass, **states)


def test_half_precision_experts_are_copied_in_float32(tmp_path):
    make("qwen2_moe", tmp_path)
    for layer_pass in load_teacher(tmp_path, experts="streamed").stream(torch.full((2, 8), 5)):
        if layer_pass.experts is not None:
            stored = layer_pass.experts[0]
            stored.dtype = torch.bfloat16
            copied = dense(stored, 0.5)
            assert copied.gate.dtype == copied.down.dtype == torch.float32
