"""Experts drawn from the router's distribution: their frequencies by enumeration, and the teacher that uses them."""

import itertools

import pytest
import torch
import xxhash

from moe2dense.common.seeds import uniforms
from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher, normalizes
from moe2dense.teacher.sampled_routing import choose_experts
from tests.teacher.families import blocks, make


def test_frequencies_are_those_of_drawing_one_after_the_other():
    """Every ordered pair and triple by hand; index gives the experts in another order for every token."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    n, generator = 40_000, torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(5, generator=generator) for _ in range(n)])
    u = torch.rand(n, 5, generator=generator, dtype=torch.float64)
    for k in (1, 2, 3):
        expected = torch.zeros(5, dtype=torch.float64)
        for order in itertools.permutations(range(5), k):
            chance, left = 1.0, 1.0
            for e in order:
                chance, left = chance * float(p[e]) / left, left - float(p[e])
            expected[list(order)] += chance
        drawn, weights = choose_experts(index, p[index], u, k, True)
        found = torch.bincount(drawn.flatten(), minlength=5) / n
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.012)
        assert all(len(set(row)) == k for row in drawn[:100].tolist())
        own = p[drawn]
        torch.testing.assert_close(weights, own / own.sum(1, keepdim=True))
        again, plain = choose_experts(index.flip(1), p[index.flip(1)], u, k, False)
        assert torch.equal(again, drawn)  # the random number is the expert's, not its place's
        torch.testing.assert_close(plain, own)


def test_experts_without_weight_come_last():
    weights = torch.tensor([[0.7, 0.0, 0.3, 0.0]])
    index = torch.arange(4)[None]
    drawn, found = choose_experts(index, weights, torch.tensor([[0.01, 0.99, 0.01, 0.5]]), 3, True)
    assert set(drawn[0, :2].tolist()) == {0, 2} and found[0].tolist() == pytest.approx([0.7, 0.3, 0.0])


@pytest.mark.parametrize(
    ("family", "expected"),
    [("mixtral", True), ("olmoe", False), pytest.param("deepseek_v3", True, marks=pytest.mark.slow)],
)
def test_whether_a_family_normalizes_is_seen_from_its_weights(family, expected, tmp_path):
    make(family, tmp_path)
    assert normalizes(load_teacher(tmp_path, memory="64MB")) is expected


def reference(model, k, seed, draw):
    """The model with gates that draw: an exponential race for every token, the first k to arrive win."""

    def gate(layer, router, ids):
        def forward(hidden):
            logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
            p, rows = logits.softmax(-1), []
            for row in ids.tolist():
                number = xxhash.xxh3_64_intdigest(f"{draw} {layer} {row}".encode())
                rows.append(torch.from_numpy(uniforms(seed, number, len(row) * p.shape[1])).view(len(row), -1))
            arrival = -torch.cat(rows).log() / p.double()
            index = arrival.argsort(1)[:, :k]
            weights = p.gather(1, index)
            return logits, weights / weights.sum(1, keepdim=True), index

        return forward

    def run(ids):
        for i, layer in enumerate(model.model.layers):
            layer.mlp.gate.forward = gate(i, layer.mlp.gate, ids)
        return model(ids).logits

    return run


def test_the_teacher_draws_as_a_model_with_such_gates(tmp_path):
    model = make("mixtral", tmp_path)
    ids = blocks(model)
    teacher = load_teacher(tmp_path, memory="64MB", draw=2, seed=5)
    found = teacher.run(ids).logits
    expected = reference(model, model.config.num_experts_per_tok, 5, 2)(ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    three = load_teacher(tmp_path, memory="64MB", draw=2, seed=5, top_k=3).run(ids).logits
    torch.testing.assert_close(three, reference(model, 3, 5, 2)(ids), rtol=1e-3, atol=1e-3)
    teacher.chunk_tokens = 30  # other chunks, other blocks beside it
    torch.testing.assert_close(teacher.run(ids[2:]).logits, found[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_teacher(tmp_path, memory="64MB", draw=3, seed=5).run(ids).logits, found, atol=1e-2)


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("olmoe", "deepseek_v3"))]
)
def test_all_experts_drawn_are_all_experts(family, tmp_path):
    model = make(family, tmp_path, **({"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}))
    text = model.config
    count = getattr(text, "n_routed_experts", None) or getattr(text, "num_local_experts", None) or text.num_experts
    ids = blocks(model)
    every = load_teacher(tmp_path, memory="64MB", top_k=count).run(ids).logits
    drawn = load_teacher(tmp_path, memory="64MB", top_k=count, draw=0).run(ids).logits
    torch.testing.assert_close(drawn, every, rtol=1e-3, atol=1e-4)


def test_a_dense_teacher_has_nothing_to_draw(tmp_path):
    make("mistral", tmp_path)
    with pytest.raises(UserError, match="one number of experts per token"):
        load_teacher(tmp_path, memory="64MB", draw=0)
