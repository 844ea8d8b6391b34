"""Training from a teacher that a server runs, by the command line: stored targets, targets in passing, on-policy, and a captured set."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from moe2dense.__main__ import main
from moe2dense.config.training import RegimeConfig
from moe2dense.data.load import load_blocks
from moe2dense.distillation.regimes.make import make_regime
from moe2dense.distillation.targets.captured.rows import is_captured
from moe2dense.distillation.targets.served.live import ask_targets
from moe2dense.distillation.targets.served.server import connect
from moe2dense.errors import UserError
from moe2dense.modeling.load import load_model

from .fake_server import TeacherServer

BLOCK = 32


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_model(tiny, "the teacher").eval()


@pytest.fixture
def student(tiny, tokenizer, tmp_path):
    """A random dense checkpoint with the teacher's tokenizer."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    folder = tmp_path / "student"
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(*arguments):
    assert not main([str(a) for a in arguments])


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line.get("loss") is not None]


def test_stored_and_asked_for_in_passing_are_one(teacher, tokenizer, student, tiny, text, tmp_path):
    arguments = ("--data", text, "--tokens", 640, "--block", BLOCK)
    with TeacherServer(teacher, tokenizer) as server:
        run("targets", tiny, *arguments, "--endpoint", server.url, "--k", 20, "--out", tmp_path / "store")
        run("distill", student, "--targets", tmp_path / "store", *arguments, "--out", tmp_path / "a")
        asked = len(server.asked)
        assert asked == 640 // BLOCK
        run("distill", student, "--endpoint", server.url, "--endpoint-k", 20, *arguments, "--out", tmp_path / "b")
        assert len(server.asked) == 2 * asked
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    run(
        "export",
        tmp_path / "store",
        "--format",
        "distillkit",
        *arguments[:4],
        "--tokenizer",
        tiny,
        "--out",
        tmp_path / "set",
    )
    assert is_captured(tmp_path / "set")
    run("distill", student, "--targets", tmp_path / "set", "--out", tmp_path / "c")
    for ours, captured in zip(losses(tmp_path / "a"), losses(tmp_path / "c"), strict=True):
        assert captured == pytest.approx(ours, rel=2e-2)


def test_on_policy_asks_about_what_the_student_wrote(teacher, tokenizer, student, text, tmp_path):
    (tmp_path / "run.toml").write_text(
        '[train]\nregime = "on-policy"\nfeatures = ""\n[regime]\nshare = "1"\nrollout_steps = 1\n'
    )
    arguments = ("--data", text, "--tokens", 320, "--block", BLOCK, "--config", tmp_path / "run.toml")
    with TeacherServer(teacher, tokenizer) as server:
        run("distill", student, "--endpoint", server.url, "--endpoint-k", 20, *arguments, "--out", tmp_path / "out")
        given = load_blocks(text, tokenizer, BLOCK, tokens=320).input_ids
        beginnings = {tuple(row[: BLOCK // 4].tolist()) for row in given}
        written = [ids for ids in server.asked if ids not in given.tolist()]
    assert written and all(tuple(ids[: BLOCK // 4]) in beginnings for ids in written)
    assert losses(tmp_path / "out")


def test_other_regimes_refuse_a_served_teacher(teacher, tokenizer):
    with TeacherServer(teacher, tokenizer) as server:
        served = connect(server.url, 5)
    with pytest.raises(UserError, match="'policy-gradient' needs the teacher itself"):
        make_regime("policy-gradient", RegimeConfig(), None, None, served)


def test_answers_in_passing_are_the_teachers(teacher, tokenizer, text):
    blocks = load_blocks(text, tokenizer, BLOCK, tokens=4 * BLOCK)
    with TeacherServer(teacher, tokenizer) as server:
        rows = ask_targets(connect(server.url, 9), blocks)[1:3].batch([1])
    with torch.no_grad():
        top = teacher(blocks.input_ids[2:3]).logits[0].log_softmax(-1).topk(9)
    assert torch.equal(rows.ids, top.indices)
    torch.testing.assert_close(rows.log_p, top.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "sampled"), "a server gives topk"),
        (("--temperature", "2"), "temperature 1"),
        (("--features", "mse:uniform"), "needs the teacher itself"),
        (("--analyze",), "needs the teacher itself"),
        (("--endpoint-parallel", "0"), "at least 1"),
    ],
)
def test_what_no_server_gives_is_refused(flags, message, tiny, text, tmp_path, capsys):
    arguments = ("--data", text, "--endpoint", "http://127.0.0.1:9/v1", "--out", tmp_path / "s", *flags)
    assert main(["targets", str(tiny), *map(str, arguments)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_conversion_trains_on_a_served_teachers_answers(teacher, tokenizer, tiny, text, tmp_path):
    with TeacherServer(teacher, tokenizer, longest=512) as server:
        run(
            "convert", tiny, "--to", "3.2m", "--init", "select+refit", "--tokens", "8k", "--block", 128, "--data", text,
            "--endpoint", server.url, "--out", tmp_path / "out",
        )  # fmt: skip
        assert len(server.asked) == 8192 // 128
    store = json.loads((tmp_path / "out" / "targets" / "store.json").read_text())
    assert store["options"]["k"] == 64 and store["source"]["model"] == "teacher"
    assert (tmp_path / "out" / "report.html").exists()
