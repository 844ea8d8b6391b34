"""Statistics of experts, the routing report, and several processes against one."""

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
from tests.teacher.families import blocks, make


def small_macro_batches(teacher, tokens):
    teacher.plan = teacher.plan.__class__(**{**vars(teacher.plan), "macro_batch": tokens})
    return teacher


def test_statistics_add_up_over_macro_batches(tmp_path):
    reference = make("granitemoe", tmp_path)
    ids = blocks(reference, n=6, s=9)
    one, many = (RoutingStats(neurons=True) for _ in range(2))
    teacher = load_teacher(tmp_path)
    teacher.run(ids, observers=[one], logits=False)
    small_macro_batches(teacher, 18).run(ids, observers=[many], logits=False)
    for i in one.layers:
        for name in ("load", "alpha", "mean_weight", "reap", "mean_output", "neuron_energy"):
            assert torch.allclose(getattr(one[i], name), getattr(many[i], name), rtol=1e-4, atol=1e-6), name


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
