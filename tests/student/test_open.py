"""A step of a run's training exports as the student it was."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe2dense.distillation.checkpoints import Checkpoints
from moe2dense.errors import UserError
from moe2dense.exporting.api import export
from moe2dense.families.cards import student_host
from moe2dense.student.locate import student_folder
from moe2dense.student.open import open_intermediate, open_student
from moe2dense.student.store import save_student
from moe2dense.student.types import Student
from tests.exporting.conftest import EXAMPLE, tiny

FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    built, trained = (tiny("mistral", seed=seed, vocab_size=4096) for seed in (1, 2))
    save_student(
        Student(built, student_host("mistral"), [None] * 3, str(EXAMPLE), "layerwise", 5),
        tmp_path / "run/build/student",
    )
    weights = dict(trained.named_parameters())
    Checkpoints(tmp_path / "run/checkpoints").save(50, weights, {"x/exp_avg": torch.ones(3)}, {"best": None})
    return tmp_path / "run", trained


def test_a_step_exports_as_the_student_it_was(run, tmp_path):
    folder, trained = run
    student = open_student(str(folder / "checkpoints/step-000050"))
    done = export(student, tmp_path / "m", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in trained.named_parameters())
    assert set(done.files) == FILES
    assert "training step 50" in (tmp_path / "m/README.md").read_text()


@pytest.mark.parametrize(
    "exported, place",
    [
        ("built", "build/student"),
        ("best", "checkpoints/final"),
        ("last", "checkpoints/final"),
        (None, "checkpoints/final"),
    ],
)
def test_a_runs_student_is_the_one_that_it_exported(run, exported, place):
    """Where training made it worse that is the built one."""
    folder, trained = run
    save_student(
        Student(trained, student_host("mistral"), [None] * 3, "", "layerwise", 5), folder / "checkpoints/final"
    )
    choice = {} if exported is None else {"choice": {"exported": exported}}
    (folder / "run.json").write_text(json.dumps({"stages": {}} | choice))
    assert student_folder(str(folder)) == folder / place


def test_a_damaged_step_is_refused(run):
    folder, trained = run
    steps = Checkpoints(folder / "checkpoints")
    steps.save(60, {"model.norm.weight": trained.model.norm.weight.detach() * float("nan")}, {}, {})
    with pytest.raises(UserError, match=r"step-000060 cannot be used: tensor 'model.norm.weight' holds NaN"):
        open_intermediate(steps.path(60))
    (steps.path(50) / "state.json").write_text("[]")
    with pytest.raises(UserError, match="state.json cannot be read"):
        open_intermediate(steps.path(50))
    (steps.path(50) / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="weights.safetensors cannot be read.*take another step"):
        open_intermediate(steps.path(50))


def test_adapters_and_strays_are_refused(run, tmp_path):
    folder, _ = run
    steps = Checkpoints(folder / "checkpoints")
    steps.save(60, {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)}, {}, {})
    with pytest.raises(UserError, match=r"lora_A\.weight, which is not the student's"):
        open_intermediate(steps.path(60))
    steps.save(70, {"lm_head.weight": torch.ones(2)}, {}, {})
    with pytest.raises(UserError, match=r"lm_head\.weight in another shape"):
        open_intermediate(steps.path(70))
    steps.path(50).rename(tmp_path / "alone")
    with pytest.raises(UserError, match="outside its run"):
        open_student(str(tmp_path / "alone"))


def test_the_command_exports_and_uploads_only_after_a_yes(run, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from moe2dense.cli.export import export_checkpoint

    sent = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo, **k: sent.append((repo, k["private"])) or "https://hub/me/m"
    )
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **k: sent.append(sorted(p.name for p in k["folder_path"].iterdir()))
    )
    step = str(run[0] / "checkpoints/step-000050")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match="add --yes"):
        export_checkpoint(step, out=tmp_path / "a", push_to_hub="me/m")
    assert not (tmp_path / "a").exists() and sent == []
    export_checkpoint(step, out=tmp_path / "a", push_to_hub="me/m", yes=True)
    assert sent == [("me/m", True), sorted(FILES)]
