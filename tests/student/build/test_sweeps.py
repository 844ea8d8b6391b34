"""Further sweeps: never worse on held-out text, undone where refused, resumed where they stopped."""

import dataclasses

import pytest
import torch

from moe2dense.config.schema import BuildConfig
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.student.build import sweeps
from moe2dense.student.build.api import build_student, build_to_folder
from moe2dense.student.store import load_student
from moe2dense.teacher.load import load_teacher

SHORT = BuildConfig(
    local_steps=12, local_lr=1e-3, local_batch=256, layer_steps=4, layer_lr=2e-4, layer_batch=512, heal_epochs=0, gram_tokens=256, hold_out=0.3, sweeps=2
)  # fmt: skip
INIT = "select+refit+local+layer"


@pytest.fixture(scope="module")
def source(tiny, text, tokenizer):
    return load_teacher(tiny, experts="streamed"), load_blocks(text, tokenizer, 64, "train", tokens=2560)


def again(student) -> list[dict]:
    return [r for r in student.history if r.get("sweep") == 2]


@pytest.mark.parametrize("to", ["40%", pytest.param("25%", marks=pytest.mark.slow)])
def test_a_second_sweep_never_raises_a_held_out_error(source, to):
    """Also where channels are pruned."""
    teacher, data = source
    once = build_student(teacher, to, data, INIT, config=dataclasses.replace(SHORT, sweeps=1))
    twice = build_student(teacher, to, data, INIT, config=SHORT)
    assert not again(once) and [r["layer"] for r in again(twice)] == list(range(len(twice.provenance)))
    assert all(r["held_out_after"] <= r["held_out_before"] for r in again(twice))
    assert any(r["held_out_after"] < r["held_out_before"] for r in again(twice))
    changed = [not torch.equal(a, b) for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True)]
    assert any(changed)
    for one, two in zip(once.provenance, twice.provenance, strict=True):
        assert one is not None and two is not None and torch.equal(one.source_neuron, two.source_neuron)


def test_a_refused_sweep_leaves_the_student_as_it_is(source, monkeypatch):
    """A local fit that makes things worse, and a layer fit that finds nothing."""
    teacher, data = source

    def worse(_state, ffn, *_):
        return dataclasses.replace(ffn, down=ffn.down + 1), {}

    once = build_student(teacher, "40%", data, INIT, config=dataclasses.replace(SHORT, sweeps=1))
    monkeypatch.setattr(sweeps, "fit_ffn", worse)
    monkeypatch.setattr(sweeps, "fit_layer", lambda *_: {})
    twice = build_student(teacher, "40%", data, INIT, config=SHORT)
    assert all(r["held_out_after"] == r["held_out_before"] for r in again(twice))
    for (name, a), b in zip(once.model.named_parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_sweep_resumes_where_it_stopped(source, tmp_path):
    teacher, data = source
    whole = build_student(teacher, "40%", data, INIT, config=SHORT)
    calls = []

    def stop(_: str, done: int, *__: object, **___: object) -> None:
        calls.append(done)
        if len(calls) == 6:  # the second layer of the second sweep
            raise KeyboardInterrupt

    out = tmp_path / "build"
    with pytest.raises(KeyboardInterrupt):
        build_to_folder(teacher, "40%", data, out / "student", out, INIT, config=SHORT, progress=stop)
    there = sorted(p.name for p in (out / "sweep-2").iterdir())
    assert there == ["layer-0000.safetensors", "layer-0001.safetensors"]
    stamp = (out / "sweep-2" / there[1]).stat().st_mtime_ns
    got = load_student(build_to_folder(teacher, "40%", data, out / "student", out, INIT, config=SHORT))
    assert (out / "sweep-2" / there[1]).stat().st_mtime_ns == stamp
    for (name, a), b in zip(whole.model.named_parameters(), got.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert len(again(got)) == len(again(whole)) == 4


def test_a_build_has_at_least_one_sweep(source):
    teacher, data = source
    with pytest.raises(UserError, match="at least 1"):
        build_student(teacher, "40%", data, INIT, config=dataclasses.replace(SHORT, sweeps=0))
