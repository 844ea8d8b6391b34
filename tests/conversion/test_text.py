"""The text of a run: the day its templates are told, what was read of it, and a tokenizer that does not fit."""

import json
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import moe2dense as m2d
from moe2dense.config.schema import DataConfig, RunConfig
from moe2dense.conversion.checks import check_text
from moe2dense.conversion.run import open_run
from moe2dense.conversion.teacher_folder import checked_teacher
from moe2dense.conversion.text_options import run_day, text_options, text_options_for
from moe2dense.exporting.gguf.vocabulary import read_vocabulary
from moe2dense.families.resolve import resolve_teacher

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/tiny-mixtral"


@pytest.fixture
def too_large(tmp_path):
    """The example's checkpoint with one token added to its tokenizer."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_does_not_fit_is_refused_first(too_large, tmp_path):
    refused = r"4097 tokens, the model's vocabulary 4096: '<pad>'"
    with pytest.raises(m2d.UserError, match=refused):
        checked_teacher(str(too_large))
    with pytest.raises(m2d.UserError, match=refused):
        m2d.plan(str(too_large), to="80%")
    with pytest.raises(m2d.UserError, match=refused):
        m2d.convert(str(too_large), to="80%", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(m2d.UserError, match=refused):
        check_text(RunConfig(model=str(too_large)), resolve_teacher(str(too_large)), 64)
    with pytest.raises(m2d.UserError, match=refused):
        m2d.load_teacher(too_large, memory="300MB").tokenizer()
    with pytest.raises(m2d.UserError, match=refused):
        read_vocabulary(AutoTokenizer.from_pretrained(too_large), 4096)


def test_a_resumed_run_keeps_its_day(tmp_path):
    config = RunConfig(model="x", out=str(tmp_path / "run"))
    with open_run(config.out, config) as run:
        today = run_day(run)
        run.save()
    assert today in {(date.today() - timedelta(days=d)).isoformat() for d in (0, 1)}
    manifest = json.loads((tmp_path / "run/run.json").read_text()) | {"date": "2025-12-31"}
    (tmp_path / "run/run.json").write_text(json.dumps(manifest))
    with open_run(config.out, config, resume=True) as run:
        assert run_day(run) == "2025-12-31"
    assert text_options(DataConfig(), "2025-12-31").date == "2025-12-31"
    assert text_options(DataConfig(date="2024-02-29"), "2025-12-31").date == "2024-02-29"


def test_a_folder_says_how_its_text_is_read(tmp_path):
    (tmp_path / "moe2dense.toml").write_text('[data]\nbos = "off"\nchat_template = "chat.jinja"\n')
    own = text_options_for(tmp_path, DataConfig())
    assert own.bos == "off" and own.chat_template == str(tmp_path / "chat.jinja") and own.learn == "all"
    assert text_options_for(tmp_path, DataConfig(bos="on")).bos == "on"
    assert text_options_for(tmp_path / "none", DataConfig()).bos == "auto"


@pytest.mark.slow
def test_a_run_goes_on_after_midnight(tmp_path, monkeypatch):
    """A template with a date renders the first day's text on the second day, so that targets of the run still fit."""
    folder, data, out = shutil.copytree(EXAMPLE, tmp_path / "teacher"), tmp_path / "data", tmp_path / "run"
    (folder / "moe2dense.toml").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "Current date: {{ strftime_now('%Y-%m-%d') }}\n{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    data.mkdir()
    for split in ("train", "valid"):
        talks = [
            [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"answer {i} " * 8}]
            for i in range(200)
        ]
        lines = [*(json.dumps({"messages": talk}) for talk in talks), json.dumps({"messages": []})]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    settings = tmp_path / "quick.toml"
    settings.write_text(
        "[data]\neval_blocks = 8\n[build]\nmin_tokens = 1024\nlocal_steps = 10\nheal_epochs = 1.0\nlayer_steps = 5\n"
        "[evaluate]\nsamples = 0\nskills = 0\n"
    )
    m2d.convert(str(folder), to="80%", data=str(data), tokens="4k", block=64, config=settings, out=out, control=False)
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["text"]["train"]["skipped"] <= 1 and manifest["text"]["train"]["used"] > 10
    assert json.loads((out / "report.json").read_text())["run"]["data"]["train"]["records"]["used"] > 10
    manifest["stages"] = {n: e for n, e in manifest["stages"].items() if n in ("build", "targets")}
    (out / "run.json").write_text(json.dumps(manifest))
    for part in ("checkpoints", "model"):
        shutil.rmtree(out / part, ignore_errors=True)

    class Later(datetime):
        """A clock of another day."""

        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

        @classmethod
        def today(cls):
            return cls(2031, 1, 2)

    monkeypatch.setattr("moe2dense.conversion.text_options.date", Later)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    m2d.convert(out=out, resume=True)
    assert (out / "model/config.json").is_file()
