"""Runs whose text, or teacher, is not the plain one: written and chosen text, rounded experts, more of them, and resuming."""

import gzip
import json
import math

import pytest
import tomlkit
import torch

import moe2dense as m2d
from moe2dense.conversion import stages
from moe2dense.conversion import training_text as texts
from moe2dense.conversion.checks import check_settings, check_text_settings
from moe2dense.conversion.configure import configure
from moe2dense.conversion.planning import make_plan
from moe2dense.conversion.show_plan import settings_notes
from moe2dense.conversion.stages import needs_targets
from moe2dense.errors import UserError
from moe2dense.families.machines import Machine
from moe2dense.teacher.load import load_teacher

QUICK = {
    "build": {"init": "obs+refit", "min_tokens": 2048, "gram_tokens": 512},
    "data": {"eval_blocks": 4, "block": 64},
    "evaluate": {"samples": 0},
}


def config(path, **tables):
    both = {k: QUICK.get(k, {}) | tables.get(k, {}) for k in QUICK.keys() | tables.keys()}
    path.write_text(tomlkit.dumps(both))
    return path


@pytest.mark.slow
def test_written_and_chosen_text(tiny, tmp_path, monkeypatch):
    write = {"share": 0.5, "prompt_tokens": 8, "shard": 64, "duplicates": 0.8}
    file = config(tmp_path / "c.toml", write=write, train={"tokens": 6144, "select": "divergence:0.5", "batch": 512})
    real = texts.select_blocks
    monkeypatch.setattr(texts, "select_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        m2d.convert(str(tiny), to="3.2m", config=file, out=tmp_path / "o")
    assert (tmp_path / "o" / "written" / "writing.json").is_file()
    monkeypatch.setattr(texts, "select_blocks", real)
    calls = []
    monkeypatch.setattr("moe2dense.generation.dataset.generate", lambda *_, **__: calls.append(1))
    result = m2d.convert(str(tiny), to="3.2m", config=file, out=tmp_path / "o", resume=True)
    assert not calls  # the text was kept
    found = json.loads((tmp_path / "o" / "run.json").read_text())["stages"]
    assert found["select"]["kept"] * 2 == found["select"]["of"] == 96
    assert found["select"]["divergence"] > found["select"]["divergence_of_all"]
    assert found["train-student"]["tokens"] == 6144  # as many steps as on all of the text
    assert result.scores["student"]["kl"]["value"] > 0


@pytest.mark.slow
def test_text_on_top_of_the_given(tiny, tmp_path, monkeypatch):
    """Half as much is written on top, from prompts of the run's own text; a resumed run keeps to that share."""
    write = {"extra": 0.5, "prompt_tokens": 8, "shard": 64}
    file = config(tmp_path / "c.toml", write=write, train={"tokens": 4096, "batch": 512})
    real, asked = stages.distill, []

    def noted(student, **options):
        asked.append(options)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(student, **options)

    monkeypatch.setattr(stages, "distill", noted)
    with pytest.raises(KeyboardInterrupt):
        m2d.convert(str(tiny), to="3.2m", config=file, out=tmp_path / "o", control=False)
    m2d.convert(str(tiny), to="3.2m", out=tmp_path / "o", resume=True)
    stopped, resumed = (options["data"] for options in asked)
    assert torch.equal(stopped.input_ids, resumed.input_ids) and len(resumed) == 64 + 32
    given = resumed.loss_mask().sum(1) > 60  # of what is written the prompts are not learnt
    assert given.sum() == 64
    found = json.loads((tmp_path / "o" / "run.json").read_text())
    assert found["extra_text"] == 0.5 and found["stages"]["write"]["tokens"] >= 33 * 64
    assert found["stages"]["train-student"]["tokens"] == 96 * 64
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (report["cost"]["tokens"], report["cost"]["written_tokens"]) == (6144, 2048)
    page = (tmp_path / "o" / "report.html").read_text()
    assert "2,048 of them it wrote itself" in page and "in 96 blocks, of which the teacher wrote 32" in page
    assert "on 4,096 tokens of" in (card := (tmp_path / "o" / "model" / "README.md").read_text())
    assert "and 2,048 that the teacher wrote on top" in " ".join(card.split())
    ours = {tuple(row.tolist()) for row in resumed.input_ids[given].unfold(1, 8, 1).flatten(0, 1)}
    lines = [
        json.loads(line)
        for shard in sorted((tmp_path / "o" / "written").glob("*.gz"))
        for line in gzip.decompress(shard.read_bytes()).decode().splitlines()
    ]
    tokenizer = load_teacher(tiny, memory="300MB").tokenizer()
    prompts = [tokenizer(line["prompt"], add_special_tokens=False)["input_ids"] for line in lines]
    assert sum(tuple(ids) in ours for ids in prompts) > 0.6 * len(prompts)  # others cross the end of a block


@pytest.mark.slow
def test_hard_labels_on_written_text_need_no_targets(tiny, tmp_path):
    file = config(tmp_path / "c.toml", write={"share": 1.0, "prompt_tokens": 8}, train={"tokens": 4096, "alpha": 1.0})
    result = m2d.convert(str(tiny), to="3.2m", config=file, out=tmp_path / "o")
    assert not (tmp_path / "o" / "targets").exists()
    assert result.scores["student"]["nll"]["value"] > 0


@pytest.mark.slow
def test_other_teachers_for_the_batches(tiny, tmp_path, monkeypatch):
    taught = []
    real = stages.training_teacher

    def noted(job, targets=False, draw=0):
        found = real(job, targets, draw)
        taught.append((targets, found.quantize, found.config.num_experts_per_tok))
        return found

    monkeypatch.setattr(stages, "training_teacher", noted)
    file = config(tmp_path / "c.toml", teacher={"quantize": "int4", "top_k": 3}, train={"tokens": 4096})
    result = m2d.convert(str(tiny), to="3.2m", config=file, out=tmp_path / "o")
    assert taught == [(False, "int4", 2), (True, "int4", 3)]
    plain = m2d.convert(
        str(tiny), to="3.2m", config=config(tmp_path / "d.toml", train={"tokens": 4096}), out=tmp_path / "p"
    )
    assert result.scores["teacher"]["nll"] == plain.scores["teacher"]["nll"]  # judged by the teacher as it is
    assert result.scores["student"]["kl"] != plain.scores["student"]["kl"]


@pytest.mark.slow
def test_experts_drawn_twice_teach_with_their_mean(tiny, tmp_path, monkeypatch):
    """The targets of a run against the distributions of two teachers asked by hand."""
    real, asked = stages.distill, []

    def noted(student, **options):
        asked.append((options["data"], options["targets"]))
        return real(student, **options)

    monkeypatch.setattr(stages, "distill", noted)
    file = config(tmp_path / "c.toml", teacher={"draws": 2}, train={"tokens": 4096})
    result = m2d.convert(str(tiny), to="3.2m", config=file, out=tmp_path / "o", control=False)
    assert result.scores["student"]["kl"]["value"] > 0
    (blocks, targets), mean = asked[0], 0
    for draw in range(2):
        teacher = load_teacher(tiny, memory="300MB", draw=draw)
        logits = teacher.run(blocks.input_ids, None, blocks.document_ids).logits[:3].flatten(0, 1)
        mean = mean + logits.softmax(-1) / 2
    rows = targets.batch([0, 1, 2])
    uniform = torch.full_like(mean, -math.log(mean.shape[1]))
    found, _ = rows.tile(slice(0, len(mean)), "forward_kl", 1.0, torch.float32)(uniform.clone(), slice(0, len(mean)))
    torch.testing.assert_close(found, (mean * (mean.log() - uniform)).sum(-1), rtol=0.02, atol=0.02)  # kept in bf16
    full = load_teacher(tiny, memory="300MB").run(blocks.input_ids, None, blocks.document_ids).logits[:3]
    assert (full.softmax(-1).flatten(0, 1) - mean).abs().max() > 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher.draws": -1}, "teacher.draws must not be negative; found -1"),
        ({"teacher.draws": 2, "train.regime": "on-policy"}, "which train.regime = 'on-policy' cannot be used with"),
        ({"teacher.draws": 2, "train.features": "mse:uniform"}, "train.features = 'mse:uniform' cannot be used with"),
        ({"teacher.draws": 3, "train.target_format": "topk"}, "train.target_format = 'topk' cannot be used with"),
        ({"write.share": 1.5}, "write.share must lie between 0 and 1"),
        ({"write.share": 0.5, "write.nll": "4"}, "LOW:HIGH"),
        ({"write.share": 0.5, "write.beams": 4}, "beam search chooses"),
        ({"write.extra": -0.5}, "write.extra must not be negative"),
        ({"write.extra": 0.5, "stages": "4m,3.2m"}, "--stages divides it"),
        ({"write.extra": 0.5, "train.targets": "t"}, "leave out write.share, write.extra"),
        ({"write.duplicates": 3.0}, "write.duplicates must lie"),
        ({"train.select": "coreset:0.5", "train.regime": "on-policy", "regime.share": "1"}, "leave one out"),
        ({"train.select": "best"}, "divergence:SHARE or coreset:SHARE"),
        ({"train.select": "coreset:0.5", "train.targets": "t"}, "leave out write.share, write.extra and train.select"),
    ],
)
def test_settings_that_mean_nothing(tiny, flags, message):
    with pytest.raises(UserError, match=message):
        check_settings(configure(str(tiny), "3.2m", None, flags))


def test_what_needs_targets(tiny):
    def settings(**flags):
        return configure(str(tiny), "3.2m", None, {f"train.{k}": v for k, v in flags.items()})

    assert needs_targets(settings())
    assert not needs_targets(settings(alpha=1.0))
    assert needs_targets(settings(alpha=1.0, select="divergence:0.5"))
    assert needs_targets(settings(alpha=1.0, alpha_schedule="linear:1:0"))
    check_text_settings(settings(select="divergence:0.5"))


def test_the_plan_says_what_is_not_plain(tiny, tmp_path, capsys):
    from moe2dense.__main__ import main

    file = config(
        tmp_path / "c.toml", write={"share": 0.5}, train={"tokens": 8192, "select": "coreset:0.5"}, teacher={"top_k": 3}
    )
    assert (
        main(["convert", str(tiny), "--to", "3.2m", "--config", str(file), "--out", str(tmp_path / "o"), "--dry-run"])
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "first writes 4.1k tokens" in shown
        or "first writes 4096 tokens" in shown
        or "first writes 4.10k tokens" in shown
    )
    assert "coreset:0.5 is trained on" in shown and "targets come from 3 experts per token" in shown
    drawn = configure(str(tiny), "3.2m", None, {"teacher.draws": 2})
    assert settings_notes(drawn, make_plan(drawn, Machine("a machine", single=1e11, disk=1e9, memory=64e9))) == [
        "targets come from as many experts as ever per token, drawn from the router's distribution, 2 times, and their distributions averaged"
    ]
