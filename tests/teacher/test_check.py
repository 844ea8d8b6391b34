"""What a teacher's folder already tells is refused from its headers alone: by loading, by plan and by inspect."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe2dense.__main__ import main
from moe2dense.config.schema import RunConfig, TeacherConfig
from moe2dense.conversion.planning import make_plan
from moe2dense.errors import UserError
from moe2dense.families.machines import Machine
from moe2dense.teacher.load import load_teacher
from moe2dense.weights.checkpoint import Checkpoint
from tests.teacher.families import make

MACHINE = Machine("a machine", single=1e11, disk=1e9, memory=64e9)


def plan(folder, to="60%"):
    return make_plan(RunConfig(model=str(folder), to=to, teacher=TeacherConfig(memory="1GB")), MACHINE)


def edit(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("experts.3.w2"), r"expert 3 of parameter \S+ is missing"),
        (without("layers.1.self_attn.q_proj"), r"no tensor for parameter 'model.layers.1.self_attn.q_proj.weight'"),
        (lambda t: {"module." + k: v for k, v in t.items()}, "DistributedDataParallel"),
        (lambda t: {**t, "model.norm.weight": torch.ones(23)}, r"'model.norm.weight' has shape \[23\]"),
        (
            lambda t: {**t, "lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)},
            "no tensor of scales beside it",
        ),
    ],
)
def test_plan_and_load_refuse_alike_and_read_nothing(tmp_path, monkeypatch, capsys, change, message):
    make("mixtral", tmp_path)
    edit(tmp_path, change)

    def read(*_args, **_options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", read)
    for look in (load_teacher, plan):
        with pytest.raises(UserError, match=message):
            look(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err


def test_an_adapter_is_refused_by_plan(tmp_path):
    make("mixtral", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\)"):
        plan(tmp_path)


def test_ignored_tensors_are_said(tmp_path, capsys):
    make("mixtral", tmp_path)
    extra = {f"mtp.{i}.weight": torch.ones(3) for i in range(5)}
    edit(tmp_path, lambda tensors: {**tensors, **extra})
    sentence = "5 tensors are ignored, which the model has no place for: mtp.0.weight, mtp.1.weight, mtp.2.weight, ..."
    assert any(sentence in w for w in plan(tmp_path).warnings)
    with pytest.warns(UserWarning, match="5 tensors are ignored"):
        assert sorted(load_teacher(tmp_path).ignored) == sorted(extra)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    (remark,) = json.loads(capsys.readouterr().out)["remarks"]
    assert sentence in remark
    assert main(["inspect", str(tmp_path)]) == 0
    assert "5 tensors are ignored" in " ".join(capsys.readouterr().out.split())


def test_a_student_of_a_teacher_that_is_not_tied_is_not_tied(tmp_path):
    """config.json ties embedding and head, the checkpoint holds two different tensors: transformers reads both."""
    make("qwen3_moe", tmp_path, tie_word_embeddings=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    planned = plan(tmp_path)
    assert not planned.target.config.tie_word_embeddings
    assert any("they are not tied, as in transformers" in w for w in planned.warnings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts_per_tok", 9, "num_experts_per_tok is 9, but a token uses between 1 and all of the experts .num_local_experts: 5"),
        ("num_experts_per_tok", 0, "num_experts_per_tok is 0"),
        ("num_experts_per_tok", 2.5, "num_experts_per_tok"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is NaN"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("nan")}, "rope_parameters.rope_theta is NaN"),
    ],
)  # fmt: skip
def test_numbers_of_the_config_that_mean_nothing_are_refused(tmp_path, field, value, message):
    make("mixtral", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for use in (load_teacher, plan):
        with pytest.raises(UserError, match=message):
            use(tmp_path)


def test_a_folder_without_weights_can_be_planned(tmp_path):
    make("mixtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert any("holds no weights yet" in w for w in plan(tmp_path).warnings)
    with pytest.raises(UserError, match="has neither model.safetensors"):
        load_teacher(tmp_path)
