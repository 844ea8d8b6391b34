"""`moe2dense targets` and `distill --targets` as users meet them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from moe2dense.__main__ import main
from moe2dense.common import object_store
from moe2dense.config.schedules import temperature_settings
from moe2dense.distillation.trainer import Trainer
from moe2dense.errors import UserError


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    """A small dense checkpoint with the teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tiny, text, tmp_path_factory):
    """A store of 64 blocks of 64 tokens with features and routing."""
    folder = tmp_path_factory.mktemp("targets") / "store"
    flags = [
        "--data",
        text,
        "--out",
        folder,
        "--tokens",
        "4096",
        "--block",
        "64",
        "--features",
        "relation:last+mse:last",
    ]
    assert main(list(map(str, ["targets", tiny, *flags, "--token-weights", "router-entropy"]))) == 0
    return folder


def test_analysis_needs_no_store(tiny, text, capsys):
    arguments = ["targets", str(tiny), "--data", str(text), "--tokens", "1024", "--block", "64", "--analyze"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["tokens"] == 16 * 63 and len(found["examples"]) == 5
    assert found["all"]["information"] == pytest.approx(found["all"]["nll"] - found["all"]["entropy"])
    assert sum(d["tokens"] for d in found["domains"].values()) == 16 * 63
    assert 2 < found["all"]["entropy"] < 6 and found["all"]["top5_mass"] > found["all"]["top1_mass"]


def test_analysis_of_a_store_as_a_table(tiny, text, store, capsys):
    arguments = ["targets", str(tiny), "--data", str(text), "--out", str(store), "--tokens", "4096", "--block", "64"]
    arguments += ["--features", "relation:last+mse:last", "--token-weights", "router-entropy", "--analyze"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())  # however wide the terminal is
    assert "hidden targets of 4096 tokens" in shown and "information" in shown and "expected" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out is missing"),
        (["--out", "x", "--temperature", "2"], "hidden targets serve any"),
        (["--analyze", "--format", "topk"], "--analyze needs the whole distribution"),
        (["--out", "x", "--features", "mse:last:9"], "layers outside 4"),
        (["--out", "x", "--format", "topk", "--features", "mse"], "features ride along with hidden targets only"),
        (["--out", "x", "--token-weights", "entropy"], "token weights must be one of"),
        (["--out", "x", "--format", "topk", "--k", "0"], "k must be at least 1"),
    ],
)
def test_bad_flags_are_one_sentence(tiny, text, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(["targets", str(tiny), "--data", str(text), "--tokens", "512", "--block", "64", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_temperature_is_chosen_on_text_held_out_from_the_store(student, text, store, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(
        '[train]\nfeatures = "relation:last@0.5+mse:last"\ntoken_weights = "router-entropy"\nbatch = 512\n'
    )
    arguments = ["distill", str(student), "--data", str(text), "--targets", str(store), "--out", str(tmp_path / "out")]
    arguments += ["--tokens", "4096", "--block", "64", "--temperature", "auto", "--config", str(config)]
    assert main(arguments) == 0
    chosen = json.loads((tmp_path / "out" / "temperature.json").read_text())
    assert (
        set(chosen["valid_kl"]) == {"1", "1.5", "2", "4"}
        and str(chosen["temperature"]).rstrip("0.") in chosen["valid_kl"]
    )
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["valid_kl"] > records[-1]["valid_kl"] and records[-1]["parts"]["features"] > 0
    assert main([*arguments, "--resume"]) == 0  # nothing is left to do, and nothing is tried again


@pytest.mark.filterwarnings("ignore:DISTILLATION MADE THE STUDENT WORSE")
def test_the_student_closest_to_its_teacher_is_exported(student, text, store, tmp_path, capsys):
    """Training at an absurd rate makes it worse, so the model is the student as it was."""
    (tmp_path / "c.toml").write_text("[train]\nbatch = 256\n")
    flags = [
        "--data",
        text,
        "--targets",
        store,
        "--tokens",
        "4096",
        "--block",
        "64",
        "--config",
        tmp_path / "c.toml",
    ]
    flags = [str(flag) for flag in flags]
    assert main(["distill", str(student), *flags, "--lr", "3", "--out", str(tmp_path / "worse")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "brought the student no closer to its teacher, and the model is the student as it was (held-out KL" in shown
    before = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "worse" / "model", dtype=torch.bfloat16).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert main(["distill", str(student), *flags, "--lr", "1e-3", "--out", str(tmp_path / "better")]) == 0
    assert "no closer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--targets": "nowhere"}, "is no store (it has no store.json); write one with `moe2dense targets`"),
        ({"--block": "32"}, "are of other text, another tokenizer or another block length (64)"),
        ({"--seed": "5"}, "lack"),
        ({"--config": "attention"}, "write the targets again with --features attention:last"),
        ({"--config": "saliency"}, "hold no expert-saliency; write them again with --token-weights expert-saliency"),
    ],
)
def test_a_store_that_does_not_fit_is_one_sentence(
    student, text, store, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attention").write_text('[train]\nfeatures = "attention:last"\n')
    (tmp_path / "saliency").write_text('[train]\ntoken_weights = "expert-saliency"\n')
    flags = {"--data": text, "--targets": store, "--out": "out", "--tokens": "4096", "--block": "64"} | change
    assert main(["distill", str(student), *(str(x) for pair in flags.items() for x in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_temperature_may_be():
    assert temperature_settings(None) == {}
    assert temperature_settings("2.5") == temperature_settings(2.5) == {"temperature": 2.5, "temperature_schedule": ""}
    assert temperature_settings("auto") == {"temperature_schedule": "auto"}
    assert temperature_settings("linear:4:1") == {"temperature_schedule": "linear:4:1"}
    for wrong in ("hot", "-1", 0.0, "linear:2:0", "linear:x"):
        with pytest.raises(UserError, match="--temperature must"):
            temperature_settings(wrong)


def test_distill_goes_on_from_its_mirror(student, text, store, tmp_path, monkeypatch, capsys):
    """The folder is lost in the middle of training; what is trained from the mirror is what one run trains, bit by bit."""
    monkeypatch.setattr(object_store, "WAIT", 0.0)
    (tmp_path / "c.toml").write_text("[train]\nbatch = 256\nsave_every = 3\n")
    flags = ["--data", text, "--targets", store, "--tokens", "4096", "--block", "64", "--config", tmp_path / "c.toml"]
    flags = ["distill", str(student), *map(str, flags)]
    mirror, first, second = f"file://{tmp_path}/mirror", tmp_path / "first", tmp_path / "second"
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    after_step = Trainer._after_step

    def stop(self, *args, **kwargs):
        after_step(self, *args, **kwargs)
        if self.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_step", stop)
        assert main([*flags, "--out", str(first), "--mirror", mirror]) == 130
    shutil.rmtree(first)
    assert main([*flags, "--out", str(second), "--mirror", mirror]) == 2
    assert "holds a run; continue it with --resume" in " ".join(capsys.readouterr().err.split())
    assert main([*flags, "--out", str(second), "--mirror", mirror, "--resume"]) == 0
    one, other = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "whole", second))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert main([*flags, "--out", str(tmp_path / "n"), "--mirror", "nowhere://a"]) == 2
    assert "--mirror nowhere://a cannot be used" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "n").exists()
