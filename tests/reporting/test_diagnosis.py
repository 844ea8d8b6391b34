"""Each known failure is named when its numbers show it, and a healthy run is left alone."""

import math

import pytest

from moe2dense.reporting.diagnosis import RULES, diagnose


def healthy():
    def est(x, spread=0.05):
        return {"value": x, "low": x - abs(x) * spread, "high": x + abs(x) * spread}

    row = {"kl": est(0.1), "nll": est(3.7), "teacher_nll": est(3.6), "entropy": est(3.4), "entropy_gap": est(0.05)}
    return {
        "teacher": {"vocab_size": 4096},
        "student": {"width": 512, "method": "layerwise"},
        "cost": {"active_ratio": 1.0, "build_tokens": 49_920},
        "rows": {"student": row, "before": {"kl": est(1.0)}},
        "ood": {"student": {"kl": est(0.15)}},
        "retention": {"overall": est(0.87)},
        "train_scores": {"kl": est(0.09)},
        "transfer": {"model": {"experts": 32, "measured": 31}},
        "history": [{"valid_kl": 0.2, "valid_rare_kl": 0.4, "valid_nll": 3.8}, {"valid_kl": 0.1, "valid_rare_kl": 0.2, "valid_nll": 3.7}],
        "build": [{"layer": i, "error": 0.4, "local_best_step": 300, "layer_best_step": 20} for i in range(30)]
        + [{"heal_kl_before": 0.4, "heal_kl_after": 0.2, "heal_best_step": 90}],
        "choice": {"exported": "last", "step": 200, "steps": 200, "kl": {"built": 0.9, "last": 0.1}},
        "run": {
            "config": {"train": {"alpha": 0.0, "temperature": 1.0, "tokens": 500_000}, "build": {"max_tokens": 200_000}},
            "data": {"train": {"tokens": 499_968}},
        },
    }  # fmt: skip


def student(name, value):
    return lambda r: r["rows"]["student"].update({name: {"value": value, "low": value, "high": value}})


def train(**values):
    return lambda r: r["run"]["config"]["train"].update(values)


PROVOKED = {
    "tokenizer_mismatch": [student("teacher_nll", 8.2), student("nll", 8.3)],
    "broken_student": [student("nll", math.log(4096) + 1)],
    "worse_than_control": [lambda r: r.update(retention={"overall": {"value": -0.4, "low": -0.6, "high": -0.2}})],
    "training_gained_nothing": [lambda r: r.update(choice={"exported": "built", "step": 0, "steps": 200, "kl": {"built": 0.02, "last": 0.9}})],
    "later_steps_hurt": [lambda r: r.update(choice={"exported": "best", "step": 50, "steps": 200, "kl": {"built": 0.9, "best": 0.1, "last": 0.2}})],
    "mode_collapse": [student("entropy", 1.5), student("entropy_gap", -1.9)],
    "capacity_gap": [lambda r: r["cost"].update(active_ratio=0.2), student("kl", 0.9), lambda r: r["train_scores"].update(kl={"value": 0.85})],
    "temperature_too_high": [train(temperature=4.0), student("entropy_gap", 0.6)],
    "alpha_out_of_balance": [train(alpha=0.7), lambda r: r["history"].append({"valid_kl": 0.15, "valid_rare_kl": 0.2, "valid_nll": 3.6})],
    "rare_tokens_suffer": [lambda r: r["history"].append({"valid_kl": 0.09, "valid_rare_kl": 0.3, "valid_nll": 3.7})],
    "judged_by_training_text": [lambda r: r["run"]["data"].update(valid={"seen_in_training": 0.4})],
    "memorised": [lambda r: r["train_scores"].update(kl={"value": 0.03})],
    "few_calibration_tokens": [lambda r: r["cost"].update(build_tokens=5_000)],
    "far_on_other_text": [lambda r: r["ood"]["student"].update(kl={"value": 0.5, "low": 0.4, "high": 0.6})],
    "fits_kept_nothing": [lambda r: [row.update(local_best_step=0) for row in r["build"][9:30]]],
    "layers_lost": [lambda r: [row.update(error=2.0 + row["layer"]) for row in r["build"][27:30]]],
    "heal_kept_nothing": [lambda r: r["build"][-1].update(heal_best_step=0)],
    "heal_left_out": [lambda r: r["build"].__setitem__(-1, {"heal_skipped": "training the student end to end takes 115 GB, --memory is 40 GB"})],
    "neurons_not_considered": [lambda r: [row.update(pool=19_498, neurons=114_688) for row in r["build"][:30]]],
    "experts_unmeasured": [lambda r: r["transfer"]["model"].update(measured=20)],
}  # fmt: skip


def test_a_healthy_run_is_left_alone_and_so_is_an_empty_report():
    assert diagnose(healthy()) == [] and diagnose({}) == []


@pytest.mark.parametrize("name", PROVOKED)
def test_each_failure_is_named_alone_with_a_remedy(name):
    report = healthy()
    for change in PROVOKED[name]:
        change(report)
    findings = diagnose(report)
    assert [f["id"] for f in findings] == [name]
    assert any(c.isdigit() for c in findings[0]["finding"]) and findings[0]["remedy"].endswith(".")


def test_every_rule_has_a_case_and_a_random_start_needs_no_calibration():
    assert {rule.__name__ for rule in RULES} == set(PROVOKED)
    report = healthy()
    report["cost"]["build_tokens"], report["student"]["method"] = 100, "random"
    assert diagnose(report) == []


@pytest.mark.parametrize(
    "tokens,most,loaded,remedy",
    [
        (500_000, 5_000, 500_000, "Set build.max_tokens to 10,240 or more in a --config file."),
        (8_000, 200_000, 8_000, "Set --tokens to 10,240 or more."),
        (8_000, 5_000, 8_000, "Set --tokens to 10,240 or more, and set build.max_tokens to 10,240 or more in a --config file."),
        (500_000, 200_000, 6_000, "Add text to --data, which has 6,000 tokens."),
        (500_000, 200_000, 500_000, "Set build.min_tokens to 10,240 in a --config file."),
    ],
)  # fmt: skip
def test_the_remedy_against_few_tokens_is_what_keeps_the_build_from_more(tokens, most, loaded, remedy):
    report = healthy()
    report["cost"]["build_tokens"] = 5_000
    report["run"]["config"] = {"train": {"tokens": tokens}, "build": {"max_tokens": most}}
    report["run"]["data"]["train"]["tokens"] = loaded
    assert [f["remedy"] for f in diagnose(report)] == [remedy]


def test_a_build_that_went_wrong_says_how_many_layers_of_how_many():
    report = healthy()
    for row in report["build"][3:30]:
        row |= {"error": 2_233.0 if row["layer"] == 12 else 1.5, "local_best_step": 0 if row["layer"] > 8 else 4}
    shown = {f["id"]: f["severity"] + ": " + f["finding"] for f in diagnose(report)}
    assert shown["layers_lost"].startswith("error: 27 of 30 layers, from layer 3 on, ")
    assert "layer 12 with 2233" in shown["layers_lost"].replace(",", "")
    assert shown["fits_kept_nothing"].startswith("warning: 21 of 30 FFN fits ended")


def test_errors_come_first():
    report = healthy()
    for name in ("few_calibration_tokens", "mode_collapse"):
        for change in PROVOKED[name]:
            change(report)
    assert [f["severity"] for f in diagnose(report)] == ["error", "warning"]


def test_what_may_be_lost_is_not_held_against_the_student():
    report = healthy()
    for change in PROVOKED["broken_student"]:
        change(report)
    report["retention"] = {
        "overall": {"value": -0.4, "low": -0.6, "high": -0.2},
        "kept": healthy()["retention"]["overall"],
    }
    report["ood"]["student"]["kl"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    fine = healthy()
    parts = {
        "held_out": {"kept": fine["rows"], "lost": report["rows"]},
        "ood": {"kept": fine["ood"], "lost": report["ood"]},
    }
    assert {f["id"] for f in diagnose(report)} >= {"broken_student"}
    assert diagnose(report | {"apart": {"domains": ["code"], **parts}}) == []
