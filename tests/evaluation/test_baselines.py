"""What is refused before anything is computed: baselines that speak other tokens, domains that are not there."""

import json

import pytest

from moe2dense.conversion.checks import check_allowed
from moe2dense.errors import UserError
from moe2dense.evaluation.baselines import check_baselines, open_baseline, row_names


def test_a_baseline_must_speak_the_teachers_tokens(tiny, tokenizer, tmp_path):
    check_baselines([str(tiny)], tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"--baseline .* has another tokenizer"):
        check_baselines([str(tiny), str(tmp_path)], tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        check_baselines([str(tmp_path)], tokenizer)


def test_baselines_that_are_not_there(tokenizer):
    with pytest.raises(UserError, match="no folder and no hub id"):
        check_baselines(["nowhere"], tokenizer)
    with pytest.raises(UserError, match="STUDENT some-owner/nothing-here is no folder, and cannot be had from the hub"):
        check_baselines(["some-owner/nothing-here"], tokenizer, "STUDENT")
    with pytest.raises(UserError, match="neither a run nor a checkpoint"):
        open_baseline("tests")


def test_rows_keep_apart():
    given = ["runs/a/model", "far/sibling", "out/student", "runs/b/model", "one/a", "two/a", "student"]
    shown = [
        "a/model",
        "sibling",
        "out/student",
        "b/model",
        "one/a (baseline)",
        "two/a (baseline)",
        "student (baseline)",
    ]
    assert row_names(given) == dict(zip(shown, given, strict=True))


@pytest.mark.parametrize(
    ("allowed", "domains", "message"),
    [
        (["coed"], ["code", "law"], "names 'coed', .*did you mean 'code'.*its domains are code, law"),
        (["code"], ["", ""], "has no domains"),
        (["code", "law"], ["code", "law"], "every domain"),
    ],
)
def test_domains_that_cannot_be_lost(allowed, domains, message):
    with pytest.raises(UserError, match=message):
        check_allowed(allowed, domains)


def test_domains_that_can_be_lost():
    check_allowed(["code"], ["code", "law"])
    check_allowed([], [""])
    check_allowed(["code"], ["code", ""])
