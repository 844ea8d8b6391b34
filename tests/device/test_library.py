"""The library's calls on a pretended GPU: every family streams, and a student is built, trained, scored and measured there."""

import json
from dataclasses import replace

import pytest
import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.analyze import analyze_targets
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.store import open_targets
from moe2dense.distillation.targets.write import write_targets
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.transfer.measure import measure_transfer
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import generate
from moe2dense.student.build import api as build_api
from moe2dense.student.build.api import build_student
from moe2dense.student.build.heal_memory import heal_choices
from moe2dense.teacher import skeleton
from moe2dense.teacher.load import load_teacher
from moe2dense.teacher.routing import RoutingStats
from tests.device.pretend import PretendedCuda
from tests.device.runs import states_rest
from tests.student.build.test_build import target_for
from tests.teacher.families import FAMILIES, make

SHORT = BuildConfig(
    local_steps=2, local_batch=32, layer_steps=2, layer_batch=32, heal_epochs=0.5, heal_batch=32, hold_out=0.25
)


def text(n: int = 8, s: int = 12) -> Blocks:
    return Blocks(torch.randint(3, 101, (n, s), generator=torch.Generator().manual_seed(1)))


QUICK = [(family, "ram") for family in ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text")]
ALL = [(family, where) for family in sorted(FAMILIES) for where in ("gpu", "ram", "disk")]
STREAMS = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)]


@pytest.mark.parametrize(("family", "where"), STREAMS)
def test_every_family_streams(family, where, tmp_path, mostly_there):
    """In bf16, near its own forward in float32, wherever hidden states rest; products are the GPU's."""
    reference, data = make(family, tmp_path), text()
    want = reference(data.input_ids).logits
    with PretendedCuda() as counts, states_rest(where):
        teacher = load_teacher(tmp_path, device="cuda")
        assert teacher.resident == (where == "gpu")
        stats = RoutingStats(neurons=True)
        got = teacher.run(data.input_ids, observers=[stats]).logits
    assert teacher.dtype == torch.bfloat16 and got is not None and not got.is_cuda
    agree = (got.float().argmax(-1) == want.argmax(-1)).float().mean()
    assert agree > 0.7 and all(int(s.tokens) == data.tokens for s in stats.layers.values())
    mostly_there(counts)


BUILDS = [
    ("mixtral", "ram", "select+refit+local"),
    ("gpt_oss", "ram", "select"),  # its host is an MoE's wrapper, whose router is no copy of the teacher's
    *(
        pytest.param(family, where, "obs+refit+local+layer+heal", marks=pytest.mark.slow)
        for family in ("mixtral", "qwen2_moe", "llama4_text", "gpt_oss")
        for where in ("gpu", "ram", "disk")
    ),
]


@pytest.mark.parametrize(("family", "where", "init"), BUILDS)
def test_a_student_built_there_is_the_one_a_cpu_builds(family, where, init, tmp_path, monkeypatch, mostly_there):
    """To the last digits, where the teacher is computed in float32. The result is on the CPU."""
    make(family, tmp_path)
    monkeypatch.setattr(skeleton, "compute_dtype", lambda device: torch.float32)
    built = []
    for device in ("cuda", "cpu"):
        with PretendedCuda() as counts, states_rest(where if device == "cuda" else "gpu"):
            teacher = load_teacher(tmp_path, device=device)
            built.append(build_student(teacher, target_for(teacher, 24), text(), init=init, config=SHORT))
        if device == "cuda":
            mostly_there(counts)
    for got, want in zip(*(student.model.parameters() for student in built), strict=True):
        assert not got.is_cuda and got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_heal_that_saves_memory_runs_there(number, tmp_path, monkeypatch, mostly_there):
    """By some of the ways that `heal_choices` has."""
    make("mixtral", tmp_path)
    with PretendedCuda() as counts, states_rest("ram"):
        teacher = load_teacher(tmp_path, device="cuda")
        target = target_for(teacher, 24)
        way, _ = heal_choices(SHORT, target, 12, on_gpu=True)[number]
        monkeypatch.setattr(build_api, "heal_settings", lambda *_: way)
        student = build_student(teacher, target, text(16), init="random+heal", config=replace(SHORT, heal_epochs=2.0))
    record = student.history[-1]
    assert record["heal_memory"] and record["heal_kl_after"] <= record["heal_kl_before"]
    assert all(not p.is_cuda and p.dtype == torch.float32 and p.isfinite().all() for p in student.model.parameters())
    mostly_there(counts)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["gpu", "ram"])
def test_a_student_is_trained_scored_and_measured_there(where, tmp_path, mostly_there):
    make("qwen2_moe", tmp_path)
    data, valid = text(), text(6)
    with PretendedCuda() as counts, states_rest(where):
        teacher = load_teacher(tmp_path, device="cuda")
        student = build_student(teacher, target_for(teacher, 24), data, init="select")
        before = evaluate(student, teacher, valid, bootstrap=0)
        config = TrainConfig(batch=24, epochs=2, lr=3e-3, eval_every=4, micro_batch=2)
        result = distill(student, teacher, data, valid=valid, config=config)
        after = evaluate(student, teacher, valid, bootstrap=0)
        measured = measure_transfer(teacher, valid, student, scores=after, least_tokens=4, sample=40, bootstrap=0)
    assert result.history[-1]["valid_kl"] == pytest.approx(float(after.kl), rel=0.1) and after.kl < before.kl
    assert len(measured.layers) == 2 and not next(student.model.parameters()).is_cuda
    mostly_there(counts)


OTHER_FORMATS = ("topk", "sampled", "full")


@pytest.mark.parametrize("format", ["hidden", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHER_FORMATS)])
def test_targets_are_written_read_and_looked_at(format, tmp_path, mostly_there):
    make("mixtral", tmp_path / "t")
    data = text()
    with PretendedCuda() as counts:
        teacher = load_teacher(tmp_path / "t", device="cuda")
        write_targets(teacher, data, tmp_path / "targets", format=format, k=5, draws=8)
        rows = open_targets(tmp_path / "targets", data, teacher=teacher).batch([0, 3])
        assert len(rows) == 2 * data.input_ids.shape[1]
        if format == "hidden":
            assert analyze_targets(hidden_targets(teacher, data), data)["all"]["tokens"] > 0
    mostly_there(counts)


SAMPLING = [
    Sampling(temperature=1.0, seed=3),
    pytest.param(Sampling(temperature=0.0, beams=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_texts_are_written_there(sampling, tmp_path, mostly_there):
    make("mixtral", tmp_path)
    with PretendedCuda() as counts:
        teacher = load_teacher(tmp_path, device="cuda")
        written = generate(teacher, [[5, 6, 7], [8, 9]], 4, {2}, sampling)
    assert [len(c.ids) for c in written] == [4, 4] or any(c.stopped for c in written)
    mostly_there(counts)


def test_embedding_rows_are_sent_once(tmp_path):
    """Not for every chunk of tokens."""
    make("mixtral", tmp_path)
    data = text(9)
    with PretendedCuda() as counts:
        teacher = load_teacher(tmp_path, device="cuda")
        teacher.chunk_tokens = 24  # two blocks
        teacher.run(data.input_ids, logits=False)
    sent = [n for (way, where), n in counts.moved.items() if way == "to cuda" and where.startswith("teacher/skeleton")]
    table = 2 * 24 * len(data.input_ids.unique())
    assert any(table <= n < 2 * table + 8 * data.tokens for n in sent)


def test_waits_of_the_host_are_few(tmp_path, record_property):
    """A layer's pass waits for its routing, its block's factor and its hidden states, not for every expert or every chunk's values."""
    make("mixtral", tmp_path)
    with PretendedCuda() as counts:
        teacher = load_teacher(tmp_path, device="cuda")
        teacher.run(text(16).input_ids, logits=False)
    layers = len(teacher.body.layers)
    record_property("waits", json.dumps({place: number / layers for place, number in counts.waits.items()}))
    assert sum(counts.waits.values()) <= 5 * layers + 4, counts.waits


def test_training_leaves_the_gpu_alone_where_the_cpu_is_asked_for(tmp_path):
    make("mixtral", tmp_path)
    data = text(4)
    with PretendedCuda() as counts:
        teacher = load_teacher(tmp_path, device="cpu")
        student = build_student(teacher, target_for(teacher, 24), data, init="random")
        distill(student, teacher, data, config=TrainConfig(batch=24, epochs=1, lr=1e-3), device=teacher.device)
    assert counts.on("cuda") == 0 and counts.on("cpu") > 0
