"""Planted structure: what was copied, dropped, duplicated, unused or of one domain is reported as just that."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.transfer import coverage
from moe2dense.evaluation.transfer.domain_lift import domain_lift
from moe2dense.evaluation.transfer.measure import measure_transfer
from moe2dense.families.cards import student_host
from moe2dense.student.types import NEW, LayerProvenance, Student
from moe2dense.teacher.load import load_teacher
from tests.teacher.families import make

V, H, F, E, LAYERS = 50, 24, 12, 4, 2
SHAPE = dict(vocab_size=V, hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2)


def make_teacher(seed=0, experts=E, change=None):
    torch.manual_seed(seed)
    config = MixtralConfig(
        **SHAPE, intermediate_size=F, num_local_experts=experts, num_experts_per_tok=2, initializer_range=0.5
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        if change:
            change(model)
    model.set_experts_implementation("eager")
    return model


def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "teacher")
    return load_teacher(tmp_path / "teacher", memory="1GB", device="cpu")


def ffn_of(model, layer, expert):
    experts = model.model.layers[layer].mlp.experts
    gate, up = experts.gate_up_proj[expert].chunk(2)
    return gate, up, experts.down_proj[expert]


def make_student(teacher, width, sources=(), scale=0.5, seed=7):
    """A Mistral with the teacher's attention; its FFN holds the experts `sources` whole, the rest of the width random."""
    torch.manual_seed(seed)
    config = MistralConfig(
        **SHAPE, intermediate_size=width, initializer_range=0.5, sliding_window=None,
        rope_parameters=teacher.config.rope_parameters, rms_norm_eps=teacher.config.rms_norm_eps,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    model.load_state_dict({k: v for k, v in teacher.state_dict().items() if ".mlp." not in k}, strict=False)
    provenance = []
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(0.2)
            for n, e in enumerate(sources):
                gate, up, down = ffn_of(teacher, i, e)
                layer.mlp.gate_proj.weight[n * F : (n + 1) * F] = gate
                layer.mlp.up_proj.weight[n * F : (n + 1) * F] = up
                layer.mlp.down_proj.weight[:, n * F : (n + 1) * F] = down * scale
            experts = teacher.config.num_local_experts
            source = torch.full((width,), NEW)
            neuron = torch.full((width,), -1)
            for n, e in enumerate(sources):
                source[n * F : (n + 1) * F], neuron[n * F : (n + 1) * F] = e, torch.arange(F)
            kept = torch.tensor([1.0 if e in sources else 0.0 for e in range(experts)])
            provenance.append(LayerProvenance(source, neuron, torch.ones(experts), kept))
    return Student(model, student_host("mistral"), provenance, "teacher", "concat", 0)


def text(n=24, s=32, seed=1, domains=("law", "code", "news")):
    ids = torch.randint(0, V, (n, s), generator=torch.Generator().manual_seed(seed))
    return Blocks(ids, [domains[i % len(domains)] for i in range(n)])


def test_copied_experts_survive_and_dropped_ones_do_not(tmp_path):
    model = make_teacher()
    transfer = measure_transfer(saved(model, tmp_path), text(), make_student(model, 2 * F, sources=(0, 2)))
    for row in transfer.layers:
        cover = row["metrics"]["coverage"]
        assert min(cover[0], cover[2]) > 0.95, cover
        assert max(cover[1], cover[3]) < 0.2, cover
        assert all(a <= c <= b for a, c, b in zip(row["coverage_low"], cover, row["coverage_high"], strict=True))
        assert row["provenance"] == ["kept", "dropped", "kept", "dropped"] and row["neurons_from"] == [F, 0, F, 0]
        assert row["metrics"]["kept_neurons"] == row["metrics"]["kept_energy"] == [1.0, 0.0, 1.0, 0.0]
        share = row["metrics"]["energy_share"]
        clipped = [min(1, max(0, c)) for c in cover]
        assert row["rollup"]["coverage"] == pytest.approx(np.average(clipped, weights=share))
    assert transfer.model["transferred"] == pytest.approx(np.mean([r["rollup"]["coverage"] for r in transfer.layers]))
    assert {e for _, e in transfer.best[:4]} == {0, 2} and {e for _, e in transfer.worst[:4]} == {1, 3}
    assert transfer.model["measured"] == transfer.model["experts"] == LAYERS * E


def test_a_duplicate_is_replaceable_and_others_are_not(tmp_path):
    def duplicate(model):
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[3] = layer.mlp.experts.gate_up_proj[1]
            layer.mlp.experts.down_proj[3] = 2 * layer.mlp.experts.down_proj[1]

    model = make_teacher(change=duplicate)
    transfer = measure_transfer(saved(model, tmp_path), text(), make_student(model, F))
    for row in transfer.layers:
        value = row["metrics"]["replaceability"]
        assert value[1] == pytest.approx(1, abs=1e-4) and value[3] == pytest.approx(1, abs=1e-4)
        assert max(value[0], value[2]) < 0.6
        assert row["replaced_by"][1] == 3 and row["replaced_by"][3] == 1


def by_domain(model):
    """Tokens below V/2 carry +1, others -1: expert 1 serves the former, 2 the latter, 0 all, 3 none."""
    table = model.model.embed_tokens.weight
    table[:, 0] = torch.where(torch.arange(V) < V // 2, 4.0, -4.0)
    table[:, 1] = 4.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.experts.down_proj[:, :2] = 0  # the two directions that steer stay as they are
        layer.mlp.gate.weight.zero_()
        layer.mlp.gate.weight[0, 1], layer.mlp.gate.weight[1, 0] = 2.0, 5.0
        layer.mlp.gate.weight[2, 0], layer.mlp.gate.weight[3, 1] = -5.0, -10.0


def domain_text(n=20, s=24):
    low = torch.randint(0, V // 2, (n, s), generator=torch.Generator().manual_seed(3))
    code = torch.arange(n) % 2 == 0
    return Blocks(torch.where(code[:, None], low, low + V // 2), ["code" if c else "law" for c in code])


def test_unused_is_unmeasured_and_a_domain_expert_shows_its_domain(tmp_path):
    model, blocks = make_teacher(change=by_domain), domain_text()
    transfer = measure_transfer(saved(model, tmp_path), blocks, make_student(model, F))
    assert transfer.domains == ["code", "law"] and transfer.domain_share == [0.5, 0.5]
    for row in transfer.layers:
        metrics = row["metrics"]
        assert row["measured"] == [True, True, True, False] and row["tokens"] == [480, 240, 240, 0]
        assert metrics["load"] == pytest.approx([1, 0.5, 0.5, 0])
        for key in ("coverage", "error_after", "cosine_after", "replaceability", "lift"):
            assert metrics[key][3] is None and metrics[key][0] is not None, key
        assert row["domains"][1] == [1.0, 0.0] and row["domains"][2] == [0.0, 1.0]
        assert metrics["lift"][1] == pytest.approx(2) and metrics["lift"][1] > row["lift_chance"][1]
        assert metrics["lift"][0] == pytest.approx(1)
        assert metrics["alpha"][0] == pytest.approx(metrics["mean_weight"][0], rel=1e-5)
        assert metrics["alpha"][1] == pytest.approx(metrics["mean_weight"][1] / 2, rel=1e-5)
    strict = measure_transfer(saved(model, tmp_path), blocks, make_student(model, F), least_tokens=300)
    assert strict.layers[0]["measured"] == [True, False, False, False]


def test_shuffled_labels_give_chance_lift():
    rng = np.random.default_rng(0)
    counts = rng.poisson(6, (60, 40)) * rng.integers(0, 2, (60, 40))
    above = []
    for seed in range(12):
        labels = [str(x) for x in np.random.default_rng(seed).integers(0, 3, 60)]
        lift = domain_lift(counts, labels, seed=seed)
        above.append((lift["lift_E"] > lift["chance_E"]).mean())
    assert np.mean(above) < 0.1
    planted = counts.copy()
    labels = [str(i % 3) for i in range(60)]
    planted[[i for i in range(60) if i % 3], 0] = 0
    lift = domain_lift(planted, labels)
    assert lift["lift_E"][0] > lift["chance_E"][0] and lift["share_ED"][0].tolist() == [1, 0, 0]


def constant_routing(model):
    """Experts 0 and 1 always, with weights 1/2 and 1/2."""
    model.model.embed_tokens.weight[:, 1] = 6.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[1] = 0
        layer.mlp.experts.down_proj[:, 1] = 0
        layer.mlp.gate.weight.zero_()
        layer.mlp.gate.weight[:, 1] = torch.tensor([3.0, 3.0, -3.0, -3.0])


def test_an_exact_student_has_no_error_a_silent_one_has_error_one(tmp_path):
    model, blocks = make_teacher(change=constant_routing), text()
    exact = make_student(model, 2 * F, sources=(0, 1))
    silent = copy.deepcopy(exact)
    with torch.no_grad():
        for layer in silent.model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        for layer in exact.model.model.layers:  # the same function, with scale moved from the norm to the FFN
            factor = torch.rand(H) + 0.5
            layer.post_attention_layernorm.weight *= factor
            layer.mlp.gate_proj.weight /= factor
            layer.mlp.up_proj.weight /= factor
    teacher = saved(model, tmp_path)
    scores, other = (evaluate(s, model, blocks, bootstrap=50) for s in (exact, silent))
    transfer = measure_transfer(teacher, blocks, exact, silent, scores, other)
    for row in transfer.layers:
        metrics = row["metrics"]
        assert max(metrics["error_after"][:2]) < 1e-8 and min(metrics["cosine_after"][:2]) > 0.9999
        assert (
            metrics["error_before"][:2] == pytest.approx([1, 1], abs=1e-5) and max(metrics["cosine_before"][:2]) < 1e-3
        )
        assert row["error_zero"] == [1.0] * E
        assert row["rollup"]["stream_after"] < 1e-8 < row["rollup"]["stream_before"]
        assert row["rollup"]["error_after"] < 1e-8 and row["rollup"]["error_before"] == pytest.approx(1)
        assert metrics["kl_after"][0] < 1e-6 < metrics["kl_before"][0] and metrics["kl_after"][3] is None
    assert transfer.model["reproduced"] == pytest.approx(1, abs=1e-6)
    assert transfer.model["reproduced_before"] == pytest.approx(0, abs=1e-5)


def test_a_duplicate_is_one_where_the_routing_weight_scales_the_input(tmp_path):
    """Llama 4 multiplies an expert's input with its routing weight, so probes and coverage must see that input."""
    make("llama4_text", tmp_path, vocab_size=V)
    weights = load_file(tmp_path / "model.safetensors")
    for name, value in weights.items():
        if ".experts." in name:
            value[1] = value[0] * (1 + 1e-4 * torch.randn(value[0].shape))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = MistralConfig(**{**SHAPE, "num_hidden_layers": 4}, intermediate_size=F)
    student = Student(MistralForCausalLM(config).eval(), student_host("mistral"), [None] * 4, "teacher", "random", 0)
    teacher = load_teacher(tmp_path, memory="1GB", device="cpu")
    transfer = measure_transfer(teacher, text(12, 16), student, least_tokens=8)
    assert transfer.layers
    for row in transfer.layers:
        for e in (0, 1):
            if row["measured"][e]:
                assert row["replaced_by"][e] == 1 - e and row["metrics"]["replaceability"][e] > 0.99999
    assert any(row["measured"][0] or row["measured"][1] for row in transfer.layers)


def test_numbers_equal_a_brute_force_computation(tmp_path):
    """Routing, energies, block error, cosine and conditional KL again from transformers' own forward, in float64."""
    model, blocks = make_teacher(3), text(10, 20)
    mask = torch.ones_like(blocks.input_ids, dtype=torch.bool)
    mask[2, 11:] = False
    blocks = Blocks(blocks.input_ids, blocks.domains, attention_mask=mask)
    student = make_student(model, 17)
    scores = evaluate(student, model, blocks, bootstrap=50)
    transfer = measure_transfer(saved(model, tmp_path), blocks, student, scores=scores, least_tokens=8)
    model, own = model.double(), copy.deepcopy(student.model).double()
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, out, i=i: seen.update({i: (a[0].flatten(0, 1), (out[0] if isinstance(out, tuple) else out).reshape(-1, H))}))  # fmt: skip
    with torch.no_grad():
        model(blocks.input_ids, attention_mask=mask.long())
        for i, row in enumerate(transfer.layers):
            x, y = (t[mask.flatten()] for t in seen[i])
            logits = x @ model.model.layers[i].mlp.gate.weight.T
            weight, index = logits.softmax(-1).topk(2)
            weight = weight / weight.sum(-1, keepdim=True)
            out = own.model.layers[i].mlp(x)
            kl = scores.kl_NS.flatten()[mask.flatten()].double()
            energy = torch.zeros(E, dtype=torch.float64)
            for e in range(E):
                hit = (index == e).any(-1)
                w = (weight * (index == e)).sum(-1)[hit]
                gate, up, down = ffn_of(model, i, e)
                f = (torch.nn.functional.silu(x[hit] @ gate.T) * (x[hit] @ up.T)) @ down.T
                energy[e] = (w[:, None] * f).square().sum()
                m = {k: v[e] for k, v in row["metrics"].items()}
                assert row["tokens"][e] == int(hit.sum()) and m["load"] == pytest.approx(
                    float(hit.double().mean()), rel=1e-5
                )
                assert m["mean_weight"] == pytest.approx(float(w.mean()), rel=1e-4)
                error = (out[hit] - y[hit]).square().sum() / y[hit].square().sum()
                assert m["error_after"] == pytest.approx(float(error), rel=1e-3)
                off = (y[hit] - y.mean(0)).square().sum() / y[hit].square().sum()
                assert row["error_mean"][e] == pytest.approx(float(off), rel=1e-4)
                cosine = torch.nn.functional.cosine_similarity(out[hit], y[hit], dim=1).mean()
                assert m["cosine_after"] == pytest.approx(float(cosine), abs=1e-4)
                judged = hit & ~kl.isnan()
                assert m["kl_after"] == pytest.approx(float(kl[judged].mean()), rel=1e-4)
                assert row["kl_low"][e] < m["kl_after"] < row["kl_high"][e]
            assert row["metrics"]["energy_share"] == pytest.approx((energy / energy.sum()).tolist(), rel=1e-3)


def test_ridge_errors_equal_the_primal_solution_in_float64():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((60, 9), (40, 90)):
        x, y = torch.randn(n, m, generator=generator) + 1, torch.randn(n, 5, generator=generator) - 2
        train, weights = coverage.split(n, generator), torch.rand(n, generator=generator) + 0.5
        got = coverage.ridge_errors(x, y, train, weights, (0.1,))
        constant = x[train].double().square().sum(1).mean().sqrt()
        full = torch.cat([x.double(), constant.expand(n, 1)], 1) * weights[:, None]
        t = y.double() * weights[:, None]
        a, b = full[train], full[~train]
        size = (a @ a.T).diagonal().mean()
        w = torch.linalg.solve(a.T @ a + 0.1 * size * torch.eye(m + 1, dtype=torch.float64), a.T @ t[train])
        torch.testing.assert_close(got.double(), (b @ w - t[~train]).square().sum(1), rtol=1e-3, atol=1e-4)
    assert int((~coverage.split(90, generator)).sum()) == 30
    sizes = torch.tensor([[1.0, 0], [3, 4], [0, 0], [0, 10], [5, 0]])
    assert coverage.relative_weights(sizes).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.2])


def test_a_massive_activation_of_one_held_out_token_does_not_decide_the_coverage():
    errors = torch.tensor([0.0, 0.25, 1.0, 4.0, 1e6])
    assert coverage.tempered(errors).tolist() == [0.0, 0.25, 1.0, 3.0, 1999.0]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 20, generator=generator)
    y = x @ torch.randn(20, 4, generator=generator) / 20**0.5
    train = coverage.split(300, generator)
    weights = coverage.relative_weights(y)
    massive = x.clone()
    massive[torch.nonzero(~train)[0]] *= 50

    def measured(student):
        parts = (student, torch.randn(300, 20, generator=torch.Generator().manual_seed(3)), x)
        student, random, copy = (coverage.tempered(coverage.ridge_errors(p, y, train, weights)) for p in parts)
        size = float((y * weights[:, None])[~train].square().sum())
        return float(coverage.coverage(student, random, copy, size))

    assert measured(x) == pytest.approx(1, abs=1e-6)
    assert -1 < measured(massive) < 0.9  # plain squares give minus 30


def test_the_ridge_is_chosen_by_leaving_one_out():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 30, generator=generator)
    y = x[:, :3] @ torch.randn(3, 4, generator=generator) + 2 * torch.randn(50, 4, generator=generator)
    values, vectors = torch.linalg.eigh(x.double() @ x.double().T)
    for ridge in (0.5, 20.0):
        total = 0.0
        for i in range(50):
            keep = torch.arange(50) != i
            a, t = x[keep].double(), y[keep].double()
            w = a.T @ torch.linalg.solve(a @ a.T + ridge * torch.eye(49, dtype=torch.float64), t)
            total += float((x[i].double() @ w - y[i].double()).square().sum())
        assert coverage.press(values + ridge, vectors, y.double()) == pytest.approx(total, rel=1e-8)
    train = coverage.split(50, generator)
    each = {r: float(coverage.ridge_errors(x, y, train, ridges=(r,)).sum()) for r in coverage.RIDGES}
    chosen = float(coverage.ridge_errors(x, y, train).sum())
    assert chosen in each.values() and chosen < 0.9 * max(each.values())


def test_coverage_says_nothing_where_there_is_nothing_to_tell_apart():
    one = torch.ones(10)
    assert coverage.coverage(one, one, one * 0.999, size=10.0) is None
    assert coverage.coverage(one * 0.2, one, one * 0.1, size=10.0) == pytest.approx(8 / 9)


def test_intervals_of_coverage_count_passages_and_not_tokens():
    generator = torch.Generator().manual_seed(0)
    of_passage = torch.arange(12).repeat_interleave(50)
    student = 0.5 + 0.2 * torch.randn(12, generator=generator)[of_passage]
    one = torch.ones(600)
    by_token = coverage.coverage(student, one, 0.1 * one, size=600.0)
    by_passage = coverage.coverage(student, one, 0.1 * one, size=600.0, cluster=of_passage + 7)
    assert by_token == pytest.approx(float(by_passage))
    assert by_passage.high - by_passage.low > 4 * (by_token.high - by_token.low)


def test_chance_of_domain_lift_shuffles_passages():
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(12), 8)  # eight blocks of each passage, alike
    above = {"passages": [], "blocks": []}
    for seed in range(12):
        counts = rng.poisson(rng.gamma(0.5, 8, (12, 30))[units])
        labels = [str(x) for x in np.random.default_rng(seed).integers(0, 3, 12)[units]]
        for name, given in (("passages", units), ("blocks", None)):
            lift = domain_lift(counts, labels, seed=seed, units_N=given)
            above[name].append((lift["lift_E"] > lift["chance_E"]).mean())
    assert np.mean(above["passages"]) < 0.1 < 0.4 < np.mean(above["blocks"])


def test_shapes_that_cannot_be_compared_are_refused(tmp_path):
    model = make_teacher()
    teacher, student = saved(model, tmp_path), make_student(model, F)
    scores = evaluate(student, model, text(4, 8), bootstrap=0)
    with pytest.raises(UserError, match="scores"):
        measure_transfer(teacher, text(5, 8), student, scores=scores)
    shallow = copy.deepcopy(student)
    del shallow.model.model.layers[1]
    shallow.model.config.num_hidden_layers = 1
    with pytest.raises(UserError, match="1 layers"):
        measure_transfer(teacher, text(4, 8), shallow)


def test_a_student_whose_neurons_cannot_be_watched_still_has_its_block_error(tmp_path):
    model, blocks = make_teacher(), text(8, 16)
    student = make_student(model, F)
    wrapped = dataclasses.replace(student, card=dataclasses.replace(student.card, down="no_such_module"))
    teacher = saved(model, tmp_path)
    a, b = (measure_transfer(teacher, blocks, s, least_tokens=8) for s in (student, wrapped))
    for x, y in zip(a.layers, b.layers, strict=True):
        assert "coverage" not in y["metrics"] and y["rollup"]["coverage"] is None
        assert y["metrics"]["error_after"] == x["metrics"]["error_after"]
        assert y["metrics"]["replaceability"] == pytest.approx(x["metrics"]["replaceability"])
    assert b.model["transferred"] is None and b.model["reproduced"] == a.model["reproduced"] and b.worst == []
    assert b.to_dict()["layers"][0]["error_random"] == [None] * E
