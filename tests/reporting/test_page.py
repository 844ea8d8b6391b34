"""The page is one file that says what the report dict says, and nothing in the data can break out of it."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from moe2dense.common.numbers import show_number, show_percent
from moe2dense.config.schema import RunConfig
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.evaluation.api import evaluate
from moe2dense.evaluation.reference import reference
from moe2dense.evaluation.retention import split_domains
from moe2dense.reporting.assemble import assemble_report
from moe2dense.reporting.charts import Scale, ramp_step, scale_of
from moe2dense.reporting.compare import compare_reports, print_comparison
from moe2dense.reporting.definitions import EXPERT_METRICS, MODEL_METRICS, definitions_as_markdown
from moe2dense.reporting.heatmap import heatmap_svg
from moe2dense.reporting.html import render_page, save_report
from moe2dense.reporting.report_file import read_report
from moe2dense.reporting.terminal import bars, print_report


class Page(HTMLParser):
    """Tags with attributes, and that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def island(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_page_is_well_formed_self_contained_and_complete(made_up_report):
    report = made_up_report(4, 8)
    text = render_page(report)
    page = Page(text)
    assert not [a for t, a in page.tags if t == "script" and "src" in a]
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text) and "url(" not in text and "@import" not in text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for link in [a["href"][1:] for t, a in page.tags if t == "a" and not re.match(r"#L\d", a["href"])]:
        assert link in ids
    assert sum(t == "rect" for t, _ in page.tags) == 32
    shown = "".join(page.text)
    for expected in (
        "0.106",
        "87.0%",
        "MistralForCausalLM",
        "moe2dense convert examples/tiny-mixtral",
        "Few calibration tokens",
    ):
        assert expected in shown, expected
    # every drawn chart has its numbers beside it
    assert text.count('<div class="plot">') == 5 and text.count("The numbers as a table") == 6


def test_page_carries_the_same_numbers_as_the_report(made_up_report):
    report = made_up_report(3, 5)
    data = island(render_page(report))
    for row, shown in zip(report["transfer"]["layers"], data["layers"], strict=True):
        for key in ("coverage", "kl_after", "load", "replaceability"):
            for a, b in zip(row["metrics"][key], shown["m"][key], strict=True):
                assert (a is None and b is None) or b == pytest.approx(a, rel=6e-3, abs=1e-9)
        assert [shown["provenances"][i] for i in shown["provenance"]] == row["provenance"]
    cells = re.findall(r'class="(c\d|u)"', str(heatmap_svg(report["transfer"], "coverage")))
    flat = [v for r in report["transfer"]["layers"] for v in r["metrics"]["coverage"]]
    assert cells == ["u" if v is None else f"c{min(9, max(0, int(v * 10)))}" for v in flat]


def test_text_from_models_and_data_cannot_break_out(made_up_report):
    report = made_up_report(2, 3)
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    report["teacher"]["name"] = report["run"]["command"] = report["tokens"]["0"] = evil
    report["samples"]["rows"] = [{"domain": evil, "prompt": evil, "teacher": evil, "student": evil, "text": evil}]
    report["samples"]["judge"] = evil
    report["transfer"]["layers"][0]["contexts"][0][0][1] = evil
    report["transfer"]["domains"][0] = evil
    text = render_page(report)
    page = Page(text)
    assert sum(t == "script" for t, _ in page.tags) == 2 and not [t for t, _ in page.tags if t == "img"]
    assert island(text)["domains"][0] == evil


def test_texts_side_by_side_are_shown_with_what_others_think_of_them(made_up_report):
    report = made_up_report(2, 2)
    shown = "".join(Page(render_page(report)).text)
    for expected in (
        "there was a queen",
        "there lived a miller",
        "NLL by the judge third-model",
        "samples-key.csv",
        "2.35",
        "85%",
    ):
        assert expected in shown, expected
    report["samples"]["judge"] = ""
    for row in report["samples"]["rows"]:
        row["teacher"] = None
    del report["samples"]["scores"]["teacher"]
    shown = "".join(Page(render_page(report)).text)
    assert "third-model" not in shown and "there was a king" not in shown and "there was a queen" in shown


def test_large_reports_stay_below_three_megabytes(made_up_report, tmp_path):
    page = save_report(made_up_report(48, 128), tmp_path)
    assert page.stat().st_size < 3e6
    assert island(page.read_text())["layers"][0]["examples"], "examples are thinned, not lost"


def test_a_report_with_nothing_optional_still_renders(made_up_report):
    full = made_up_report(2, 2)
    report = {k: full[k] for k in ("schema", "created", "teacher", "student")} | {
        "cost": {}, "rows": {"student": full["rows"]["student"]}, "ood": {}, "retention": None, "history": [], "control_history": [],
        "transfer": None, "train_scores": None, "samples": [], "tokens": {}, "diagnosis": [],
        "run": {"command": "", "config": {}, "plan": {}, "versions": {}, "timings": {}, "hashes": {}, "data": {}},
    }  # fmt: skip
    page = Page(render_page(report))
    assert not [a for _, a in page.tags if a.get("id") in ("map", "experts", "training")]
    report["teacher"] = {"name": ""}
    report["rows"]["student"] = copy.deepcopy(report["rows"]["student"])
    for name in ("kl", "agreement"):
        report["rows"]["student"][name] = {"value": 0.5, "low": None, "high": None}
    assert "no interval" in "".join(Page(render_page(report)).text)


def test_write_is_atomic_and_read_report_refuses_what_it_is_not(made_up_report, tmp_path):
    report = made_up_report(2, 2)
    save_report(report, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    assert read_report(tmp_path / "run")["rows"]["student"]["kl"] == report["rows"]["student"]["kl"]
    with pytest.raises(UserError, match=r"no report\.json"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="not a moe2dense report"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report | {"schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        read_report(tmp_path)


def real_scores():
    def model(seed):
        torch.manual_seed(seed)
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.4, **sizes)).eval()

    blocks = Blocks(torch.randint(0, 40, (6, 12)), ["a", "b", "a", "b", "a", "b"])
    ref = reference(model(0), blocks)
    return {"control": evaluate(model(2), ref), "teacher": evaluate(ref, ref), "student": evaluate(model(1), ref)}


class Letters:
    """Stands for a tokenizer."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_assemble_turns_a_run_into_json_with_a_page():
    rows = real_scores()
    plan = {
        "teacher": "t", "checkpoint_bytes": 1000, "tokens": 5000, "build_tokens": 500, "warnings": [],
        "shape": {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 40, "num_experts": 4, "top_k": 2,
                  "expert_width": 12, "shared_width": 0, "parameters": 8000, "active_parameters": 4000},
        "flops": 6.0, "from_scratch": 60.0,
    }  # fmt: skip
    report = assemble_report(
        config=RunConfig(model="t", to="2k"), plan=plan, student={"parameters": 2000, "width": 24, "method": "layerwise"}, rows=rows,
        ood={"student": rows["student"]}, command=["moe2dense", "convert", "a b"], allow_loss=["b"],
        history=[{"step": 1, "tokens": 100, "loss": float("nan")}], tokenizer=Letters(),
    )  # fmt: skip
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (
        report["cost"]["parameters_ratio"] == 0.25
        and report["cost"]["active_ratio"] == 0.5
        and report["cost"]["scratch_ratio"] == 0.1
    )
    assert report["run"]["command"] == "moe2dense convert 'a b'" and report["history"][0]["loss"] is None
    assert report["student"]["bytes"] == 4000 and list(report["rows"]) == ["teacher", "student", "control"]
    worst = report["rows"]["student"]["worst_tokens"]
    assert worst and report["tokens"][str(worst[0]["id"])] == chr(97 + worst[0]["id"] % 26)
    a, c = rows["student"].by_domain["a"]["kl"], rows["control"].by_domain["a"]["kl"]
    assert report["retention"]["kept"]["value"] == pytest.approx(1 - a / c)
    assert report["retention"]["overall"]["value"] == pytest.approx(1 - rows["student"].kl / rows["control"].kl)
    shown = "".join(Page(render_page(report)).text)
    assert "may be lost" in shown and show_number(float(rows["student"].kl)) in shown
    apart = report["apart"]["held_out"]
    assert apart["kept"]["student"]["kl"]["value"] == pytest.approx(a)
    assert apart["lost"]["control"]["kl"]["value"] == pytest.approx(rows["control"].by_domain["b"]["kl"])
    assert "Held-out text, without b" in shown and "Held-out text, b alone: may be lost" in shown
    assert "without b, which may be lost" in shown
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(report, console)
    text = console.export_text()
    assert "held-out text without b" in text and "b alone: may be lost" in text
    assert "% without b)" in " ".join(text.split())
    with pytest.raises(UserError, match="student"):
        assemble_report(config=RunConfig(), plan={}, student={}, rows={"teacher": rows["teacher"]})


def test_the_last_steps_row_is_told_apart_too():
    rows = real_scores()
    kept, lost = split_domains(rows["control"], ["b"])
    last = rows["control"].to_dict() | {"apart": {"kept": kept.to_dict(), "lost": lost.to_dict()}}
    report = assemble_report(
        config=RunConfig(model="t", to="2k"), plan={}, student={}, rows={n: rows[n] for n in ("teacher", "student")},
        allow_loss=["b"], last={"valid": last},
    )  # fmt: skip
    held_out = report["apart"]["held_out"]
    assert list(held_out["kept"]) == ["teacher", "student", "last"] == list(held_out["lost"]) == list(report["rows"])
    for side, domain in (("kept", "a"), ("lost", "b")):
        assert held_out[side]["last"]["kl"]["value"] == pytest.approx(rows["control"].by_domain[domain]["kl"])
    assert "apart" not in report["rows"]["last"] and report["apart"]["ood"] is None


@pytest.mark.parametrize("width", [60, 80, 140])
def test_terminal_form_fits_and_names_what_matters(made_up_report, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(made_up_report(30, 100), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text[: text.index("by domain")]  # columns go as a whole, none is cut
    for expected in ("student", "control", "0.106", "encyclopedia", "Few calibration tokens"):
        assert expected in text
    assert bars([0.0, 0.5, 1.0, None]) == "▁▅█·" and len(bars([0.5] * 300)) <= 64


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_terminal_tables_have_the_same_columns_and_say_what_they_mean(made_up_report, width):
    report = made_up_report(4, 8)
    report["ood"] = {"student": report["ood"]["student"]}  # a narrow table, for which more columns would fit
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(report, console)
    lines = console.export_text().splitlines()
    heads = [lines[i + 1].split() for i, line in enumerate(lines) if "text" in line and "  KL" in lines[i + 1]]
    assert len(heads) == 2 and heads[0] == heads[1]
    explained = " ".join(" ".join(lines).split())
    for name in (
        "KL: ",
        "same choice: ",
        "mean coverage: ",
        "coverage: ",
        "neurons: ",
        "±: ",
        "– or ·: ",
        "docs/report.md",
    ):
        assert name in explained, name
    assert ("rare KL: " in explained) == ("rare" in heads[0]) and ("ppl: " in explained) == ("ppl" in heads[0])


def test_compare_shows_what_changed(made_up_report):
    a, b = made_up_report(2, 4), made_up_report(2, 4)
    b["rows"]["student"]["kl"] = {"value": 0.08, "low": 0.075, "high": 0.085}
    b["run"]["config"]["train"]["lr"] = 5e-4
    b["transfer"]["layers"][1]["metrics"]["coverage"][2] = 0.111
    comparison = compare_reports(a, b)
    assert comparison["settings"] == {"train.lr": [1e-3, 5e-4]} and comparison["same_text"]
    assert comparison["quality"]["kl"]["separate"] and comparison["quality"]["kl"]["difference"] == pytest.approx(
        -0.026
    )
    assert not comparison["quality"]["nll"]["separate"]
    assert (comparison["experts"][0]["layer"], comparison["experts"][0]["expert"]) == (1, 2)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(comparison, console)
    assert "-0.026 *" in console.export_text()
    with pytest.raises(UserError, match="different teachers"):
        compare_reports(a, made_up_report(2, 5))


def test_scales_and_ticks_hold_what_they_show():
    for values in ([0.11, 5.6], [0.098, 0.105], [3, 30000], [1e-5, 2e-5]):
        scale = scale_of(values, log=True)
        assert len(scale.ticks()) >= 2 and all(0 <= scale(t) <= 100 for t in scale.ticks())
        assert all(0 < scale(v) < 100 for v in values)
    assert scale_of([0.2, 0.9]).low == 0 and Scale(0, 10)(5) == 50
    assert scale_of([0.2, 0.9]).ticks()[0] == 0 and scale_of([]).ticks()
    assert [show_number(x) for x in (0.0, 0.10612, 41.53, 12345.6, None, float("nan"))] == [
        "0",
        "0.106",
        "41.5",
        "12,346",
        "–",
        "–",
    ]
    assert [ramp_step(x, 0, 1) for x in (-0.1, 0, 0.05, 0.95, 1, 2, None)] == [0, 0, 0, 9, 9, 9, None]


def test_one_form_for_shares_everywhere():
    assert [show_percent(x, d) for x, d in ((0.47, 0), (0.871, 1), (None, 0))] == ["47%", "87.1%", "–"]
    assert not [m.key for m in (*MODEL_METRICS, *EXPERT_METRICS) if "0 %" in m.help]


def test_the_documentation_has_every_definition(root):
    keys = [m.key for m in (*MODEL_METRICS, *EXPERT_METRICS)]
    assert len(keys) == len(set(keys))
    assert all(m.name and m.title and m.help.endswith(".") for m in (*MODEL_METRICS, *EXPERT_METRICS))
    assert (root / "docs" / "report.md").read_text().endswith("-->\n" + definitions_as_markdown())
