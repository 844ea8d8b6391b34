"""Token samples, kept hidden states, the routing report, and several processes against one."""

import json
import math
import socket

import pytest
import torch

from moe2dense.common.processes import gather_rows, my_share
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import RoutingStats, reduce_stats
from moe2dense.teacher.routing_report import effective_experts, gini, prediction, routing_report
from moe2dense.teacher.samples import HiddenStates, TokenSample
from tests.teacher.families import blocks, make


def small_macro_batches(teacher, tokens):
    teacher.plan = teacher.plan.__class__(**{**vars(teacher.plan), "macro_batch": tokens})
    return teacher


def test_token_sample_is_uniform_seeded_and_ignores_macro_batches(tmp_path):
    reference = make("qwen2_moe", tmp_path)
    ids, mask = blocks(reference, n=6, s=17), torch.ones(6, 17, dtype=torch.long)
    mask[2, 5:] = 0
    whole, pieces, other = TokenSample(20, seed=3), TokenSample(20, seed=3), TokenSample(20, seed=4)
    teacher = load_teacher(tmp_path)
    teacher.run(ids, attention_mask=mask, observers=[whole, other], logits=False)
    every = {
        p.index: [t.clone() for t in (p.x, p.y)] + [p.top_k_index] for p in teacher.stream(ids, attention_mask=mask)
    }
    small_macro_batches(teacher, 40).run(ids, attention_mask=mask, observers=[pieces], logits=False)
    assert torch.equal(whole.position, pieces.position) and not torch.equal(whole.position, other.position)
    assert len(whole.position) == 20 and mask.flatten()[whole.position].all()
    for sample in (whole, pieces):
        for i, (x, y, index) in every.items():
            assert torch.allclose(sample.x[i], x[sample.position], atol=1e-5)
            assert torch.allclose(sample.y[i], y[sample.position], atol=1e-4)
            if index is not None:
                assert torch.equal(sample.top_k_index[i], index[sample.position])
    counts = torch.zeros(6 * 17)
    few = TokenSample(layers=[0])
    for seed in range(60):
        few.tokens, few.seed = 20, seed
        few.begin(teacher, 0)
        few._draw(mask.flatten().bool())
        counts[few.position] += 1
    assert counts[mask.flatten() == 0].sum() == 0 and counts.sum() == 60 * 20
    assert counts[mask.flatten() == 1].max() < 35  # 13.3 expected of each


def test_more_room_than_tokens(tmp_path):
    reference = make("mixtral", tmp_path)
    ids, sample = blocks(reference, n=2, s=5), TokenSample(100)
    load_teacher(tmp_path).run(ids, observers=[sample], logits=False)
    assert torch.equal(sample.position, torch.arange(10)) and sample.x[1].shape == (10, 24)


def test_hidden_states(tmp_path):
    reference = make("mixtral", tmp_path)
    ids, kept = blocks(reference, n=5, s=8), HiddenStates([0, 1])
    small_macro_batches(load_teacher(tmp_path), 16).run(ids, observers=[kept], logits=False)
    want = reference(ids, output_hidden_states=True).hidden_states
    assert set(kept.states) == {0, 1}
    for i in (0, 1):
        assert (kept.states[i] - want[i + 1]).abs().max() <= 1e-4


def test_statistics_add_up_over_macro_batches(tmp_path):
    reference = make("granitemoe", tmp_path)
    ids = blocks(reference, n=6, s=9)
    one, many = (RoutingStats(neurons=True, gram_tokens=54) for _ in range(2))
    teacher = load_teacher(tmp_path)
    teacher.run(ids, observers=[one], logits=False)
    small_macro_batches(teacher, 18).run(ids, observers=[many], logits=False)
    for i in one.layers:
        for name in (
            "load",
            "alpha",
            "reap",
            "output_norm",
            "coactivation",
            "mean_output",
            "neuron_energy",
            "output_gram",
        ):
            assert torch.allclose(getattr(one[i], name), getattr(many[i], name), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss"])
def test_output_gram_equals_loops(name, tmp_path):
    """Every pair of experts that a token chose, on that token."""
    reference = make(name, tmp_path)
    ids, mask = blocks(reference, n=4, s=9), torch.ones(4, 9, dtype=torch.long)
    mask[1, 4:] = 0
    teacher = load_teacher(tmp_path)
    whole, few = RoutingStats(gram_tokens=1000), RoutingStats(gram_tokens=5, seed=3)
    small_macro_batches(teacher, 18).run(ids, attention_mask=mask, observers=[whole, few], logits=False)
    for layer in load_teacher(tmp_path).stream(ids, attention_mask=mask):
        if not layer.sparse:
            continue
        s, count = whole[layer.index], len(layer.experts)
        want, seen = torch.zeros(count, count), torch.zeros(count, count)
        for t in layer.token_mask.nonzero()[:, 0].tolist():
            chosen = layer.top_k_index[t].tolist()
            outputs = [layer.experts[e](layer.x[t : t + 1])[0] for e in chosen]
            for a, f in zip(chosen, outputs, strict=True):
                for b, g in zip(chosen, outputs, strict=True):
                    want[a, b] += f @ g
                    seen[a, b] += 1
        assert torch.equal(s.pair_count, seen.double()) and torch.equal(s.pair_count, s.together)
        assert torch.allclose(s.output_gram, (want / seen.clamp(min=1)).double(), rtol=1e-4, atol=1e-5)
        sampled = few[layer.index]
        assert sampled.pair_count.trace() == 2 * 5 * layer.top_k_index.shape[1]  # five tokens of each macro-batch
        both = sampled.pair_count > 0
        assert (s.pair_count[both] >= sampled.pair_count[both]).all() and not sampled.output_gram[~both].any()
        assert few._sample is None  # nothing is kept beyond its layer


def test_gini_and_effective_experts():
    assert gini(torch.ones(7)) == pytest.approx(0) and effective_experts(torch.ones(7)) == pytest.approx(7)
    one = torch.tensor([0.0, 0, 5, 0])
    assert gini(one) == pytest.approx(3 / 4) and effective_experts(one) == pytest.approx(1)
    load = torch.rand(9)
    pairs = (load[:, None] - load[None]).abs().sum() / (2 * 81 * load.mean())
    assert gini(load) == pytest.approx(float(pairs), rel=1e-5)
    p = load / load.sum()
    assert effective_experts(load) == pytest.approx(math.exp(-sum(float(v) * math.log(v) for v in p)), rel=1e-5)
    assert gini(torch.zeros(3)) == 0


def test_routing_report(tmp_path):
    reference = make("deepseek_v3", tmp_path / "moe")
    ids = blocks(reference, n=4, s=12)
    text = Blocks(ids, ["a"] * 4, None, None, None)
    teacher = load_teacher(tmp_path / "moe")
    report = json.loads(json.dumps(routing_report(teacher, text)))
    assert [row["sparse"] for row in report["layers"]] == [False, True, True]
    assert (report["tokens"], report["num_experts"], report["top_k"]) == (48, 6, 3)
    for row, layer in zip(report["layers"][1:], [p for p in teacher.stream(ids) if p.sparse], strict=True):
        load = torch.bincount(layer.top_k_index.flatten(), minlength=6) / 48
        assert row["load"] == pytest.approx(load.tolist()) and row["gini"] == pytest.approx(gini(load))
        assert row["dead"] == (load == 0).nonzero()[:, 0].tolist()
        weight = torch.zeros(48, 6).scatter(1, layer.top_k_index, layer.top_k_weights).sum(0)
        ranked = (weight / weight.sum()).sort(descending=True).values
        assert row["coverage_top_k"] == pytest.approx(float(ranked[:3].sum()))
        fewest = next(n for n in range(1, 7) if float(ranked[:n].sum()) >= 0.9)
        assert row["experts_for_90"] == fewest
    assert "of 6 experts in effective use" in report["prediction"] and "48 tokens are few" in report["prediction"]
    make("qwen3", tmp_path / "dense", intermediate_size=11, head_dim=8)
    with pytest.raises(UserError, match="is a dense model and has no routing"):
        routing_report(load_teacher(tmp_path / "dense"), text)


@pytest.mark.parametrize(("effective", "verdict"), [(2.0, "is concentrated"), (5.0, "is uneven"), (7.5, "is even")])
def test_prediction(effective, verdict):
    rows = [
        {"effective_experts": effective + d, "coverage_top_k": 0.5 + d / 10, "experts_for_90": 4 + int(d)}
        for d in (-1, 1)
    ]
    line = prediction(rows, experts=8, top_k=2, tokens=10_000)
    assert line.startswith(f"{effective:.1f} of 8 experts in effective use, the 2 busiest of a layer carry 50% of the")
    assert "4.0 carry 90%" in line and f"routing {verdict}" in line and "are few" not in line and "\n" not in line


def _process(rank, folder, ids, want, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    stats, share = RoutingStats(neurons=True), my_share(len(ids))
    out = load_teacher(folder).run(ids[share], observers=[stats], logits=True)
    reduce_stats(stats)
    logits = gather_rows(out.logits)
    report = routing_report(load_teacher(folder), Blocks(ids, [""] * len(ids), None, None, None))
    found = {"share": (share.start, share.stop), "worst": (logits - want).abs().max(), "tokens": report["tokens"]}
    torch.save({**found, "load": stats[1].load, "energy": stats[2].neuron_energy}, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    reference = make("dots1", tmp_path)
    ids = blocks(reference, n=5, s=7)
    one = RoutingStats(neurons=True)
    out = load_teacher(tmp_path).run(ids, observers=[one])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")  # a fresh interpreter would take longer than the test
    workers = [context.Process(target=_process, args=(r, tmp_path, ids, out.logits, port)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for part in found:
        assert part["worst"] <= 1e-4 and part["tokens"] == 35
        assert torch.allclose(part["load"], one[1].load)
        assert torch.allclose(part["energy"], one[2].neuron_energy, rtol=1e-5, atol=1e-8)
    assert [p["share"] for p in found] == [(0, 2), (2, 5)]
