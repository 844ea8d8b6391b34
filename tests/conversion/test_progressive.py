"""Stages: what they mean, what they refuse, and a run whose students teach one another, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig

import moe2dense as m2d
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.configure import configure, stage_sizes, with_last_stage
from moe2dense.conversion.planning import make_plan, stage_targets
from moe2dense.conversion.run import MANIFEST
from moe2dense.conversion.show_plan import settings_notes
from moe2dense.data.load import load_blocks
from moe2dense.errors import UserError
from moe2dense.families.machines import Machine
from moe2dense.student.dense_teacher import target_from

QUICK = """
[data]
eval_blocks = 6
[build]
min_tokens = 2048
local_steps = 6
layer_steps = 3
heal_epochs = 1.0
gram_tokens = 512
[train]
tokens = 12288
batch = 1024
save_every = 2
eval_every = 3
[evaluate]
samples = 0
[export]
dtype = "float32"
"""


@pytest.fixture
def settings(tiny):
    return RunConfig(model=str(tiny), stages="47%,40%")


def test_the_last_stage_is_the_target(tiny, settings):
    assert stage_sizes("47%, 40%") == ["47%", "40%"]
    assert with_last_stage(settings).to == "40%"
    assert with_last_stage(replace(settings, to="40%")).stages == "47%,40%"
    assert with_last_stage(replace(settings, to="25%")).stages == "47%,40%,25%"
    assert configure(str(tiny), "", None, {"stages": "3.2m,2.6m"}).to == "2.6m"
    assert configure(str(tiny), "2.6m", None, {"stages": "3.2m"}).stages == "3.2m,2.6m"
    sizes = [t.parameters for t in stage_targets(settings)]
    assert sizes == [3_196_608, 2_606_784]
    plan = make_plan(with_last_stage(settings), Machine("a machine", single=1e11, disk=1e9, memory=64e9))
    assert "3.2M Mistral -> 2.61M Mistral, 250k tokens each" in settings_notes(settings, plan)[0]


@pytest.mark.parametrize(
    ("stages", "to", "message"),
    [
        ("47%", "", "at least two sizes"),
        ("47%,,40%", "", "at least two sizes"),
        ("47%,40%", "47%", "is not the last of --stages"),
        ("40%,47%", "", "40% .2.61M. is not|47% .3.2M. is not smaller than 40%"),
        ("47%,47%", "", "is not smaller than"),
        ("47%,owner/name", "", "can be read there|not a checkpoint"),
    ],
)
def test_stages_that_mean_nothing(settings, stages, to, message):
    with pytest.raises(UserError, match=message):
        stage_targets(with_last_stage(replace(settings, stages=stages, to=to)))


def test_a_dense_intermediate_teacher_gives_the_same_shape(tiny, text, tokenizer, settings, tmp_path):
    teacher = m2d.load_teacher(tiny, memory="300MB")
    blocks = load_blocks(text, tokenizer, 64, tokens=1024)
    large, small = stage_targets(settings)
    assert target_from(teacher, small) is small
    student = m2d.build_student(teacher, large, blocks, init="select")
    student.model.save_pretrained(tmp_path / "large")
    intermediate_teacher = m2d.load_teacher(tmp_path / "large", memory="300MB")
    target = target_from(intermediate_teacher, small)
    assert target.parameters == small.parameters and target.geometry == {} and target.teacher.expert_width == 512
    made = m2d.build_student(intermediate_teacher, target, blocks, init="obs+refit")
    mine, planned = made.model.config.to_diff_dict(), small.config.to_diff_dict()
    assert mine.pop("dtype") == "float32" and mine == planned
    ids = blocks.input_ids[:4]
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (student.model, made.model))
    random = m2d.build_student(intermediate_teacher, target, blocks, init="random").model
    with torch.no_grad():
        r = random(ids).logits.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.3 * (p.exp() * (p - r)).sum(-1).mean()
    thin = SimpleNamespace(
        card=None, config=MistralConfig(**intermediate_teacher.config.to_dict() | {"hidden_size": 128})
    )
    with pytest.raises(UserError, match="order the stages from large to small"):
        target_from(thin, small)


def command(tiny, folder, *more):
    (folder / "quick.toml").write_text(QUICK)
    return [
        sys.executable, "-m", "moe2dense", "convert", str(tiny), "--stages", "47%,40%", "--out", str(folder / "out"),
        "--config", str(folder / "quick.toml"), "--init", "obs+refit", *more,
    ]  # fmt: skip


def run(tiny, folder, *more):
    done = subprocess.run(
        command(tiny, folder, *more), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_stage_is_a_run_and_resumes_after_a_kill(tiny, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    said = run(tiny, whole, "--control")
    assert "stages:" in said
    out = whole / "out"
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert {"teacher", "before", "student", "control", "direct"} <= set(rows)
    assert rows["student"]["kl"]["value"] < rows["control"]["kl"]["value"]
    names = {p.name for p in (out / "stages").iterdir()}
    assert names == {"1-47pct", "direct"}
    for folder, size in ((out / "stages/1-47pct/model", 3_196_608), (out / "model", 2_606_784)):
        assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == size
    positions = [
        json.loads((f / MANIFEST).read_text())["stages"]["train-student"]["tokens"]
        for f in (out / "stages/1-47pct", out)
    ]
    assert positions == [6144, 6144]
    signs = (
        lambda: list((killed / "out/stages/1-47pct/checkpoints").glob("step-*")),
        lambda: list((killed / "out/build").glob("*.safetensors")),
        lambda: list((killed / "out/checkpoints").glob("step-*")),
    )
    for i, sign in enumerate(signs):
        process = subprocess.Popen(
            command(tiny, killed, *(["--resume"] if i else [])), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while not sign():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(tiny, killed, "--resume")
    expected, found = (load_file(f / "out/model/model.safetensors") for f in (whole, killed))
    assert all(torch.equal(expected[k], found[k]) for k in expected)
