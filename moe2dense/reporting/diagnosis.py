"""Known ways a distillation goes wrong, named where the numbers show them, each with its number and a remedy.

Every rule reads the report dict alone and stays silent where its numbers are missing.
"""

import math
from collections.abc import Callable
from typing import Any

from moe2dense.common.numbers import show_number, show_percent
from moe2dense.reporting.build_diagnosis import BUILD_RULES
from moe2dense.reporting.report_file import Finding, Report, finding, ood_path, score_value, transfer_totals

ACTIVE_SHARE = 0.5  # student parameters over the teacher's active ones, below which capacity is the first suspect
HIGH_KL = 0.3  # nats per token
MEMORISED = 1.5  # held-out KL over training KL
UNMEASURED_SHARE = 0.25
SEEN_IN_TRAINING = 0.05  # share of the held-out text


def diagnose(report: Report) -> list[Finding]:
    """Return findings as {"id", "severity": "error" | "warning", "title", "finding", "remedy"}, errors first."""
    findings = [result for rule in RULES if (result := rule(report)) is not None]
    return sorted(findings, key=lambda result: result["severity"] != "error")


def _score(report: Report, key: str, all_domains: bool = False) -> float | None:
    """Return a number of the student's row, without the domains that may be lost unless `all_domains` is asked for."""
    without_lost = None if all_domains else ((report.get("apart") or {}).get("held_out") or {}).get("kept")
    return score_value((without_lost or report.get("rows") or {}).get("student"), key)


def _ood_scores(report: Report) -> dict[str, Any]:
    """Return the student's numbers on out-of-distribution text, without the domains that may be lost."""
    without_lost = ((report.get("apart") or {}).get("ood") or {}).get("kept")
    return (without_lost or report.get("ood") or {}).get("student") or {}


def _train_options(report: Report) -> dict[str, Any]:
    return ((report.get("run") or {}).get("config") or {}).get("train") or {}


def _evaluations(report: Report, *keys: str) -> list[list[float]]:
    """Return the validations of the training history that have all of these numbers."""
    rows = [[r.get(k) for k in keys] for r in report.get("history") or []]
    return [r for r in rows if all(v is not None for v in r)]


def tokenizer_mismatch(report: Report) -> Finding | None:
    """Report a teacher that cannot predict the text: its loss is less than a tenth below a uniform guess."""
    nll, vocabulary = _score(report, "teacher_nll"), (report.get("teacher") or {}).get("vocab_size")
    if nll is None or not vocabulary or nll < 0.9 * math.log(vocabulary):
        return None
    return finding(
        "tokenizer_mismatch", "error", "Tokenizer mismatch",
        f"The teacher's own loss on this text is {nll:.2f} nats, about a uniform guess over {vocabulary} tokens "
        f"({math.log(vocabulary):.2f}).",
        "Tokenise the data with the teacher's own tokenizer, and check that its checkpoint is whole.",
    )  # fmt: skip


def broken_student(report: Report) -> Finding | None:
    """Report a student that is worse than a uniform guess where the teacher is not."""
    nll, vocabulary = _score(report, "nll"), (report.get("teacher") or {}).get("vocab_size")
    if nll is None or not vocabulary or nll < math.log(vocabulary) or tokenizer_mismatch(report):
        return None
    return finding(
        "broken_student", "error", "The student predicts worse than chance",
        f"Its loss is {nll:.2f} nats; a uniform guess over {vocabulary} tokens has {math.log(vocabulary):.2f}.",
        "Training has diverged or weights are missing: lower --lr, and compare with the student before training.",
    )  # fmt: skip


def worse_than_control(report: Report) -> Finding | None:
    """Report a gap closed whose whole interval lies below zero."""
    share = (report.get("retention") or {}).get("kept") or (report.get("retention") or {}).get("overall") or {}
    if share.get("high") is None or share["high"] >= 0:
        return None
    return finding(
        "worse_than_control", "error", "Worse than starting from random weights",
        f"The student closes {show_percent(share['value'])} of the gap between control and teacher; the 95% interval ends at "
        f"{show_percent(share['high'])}.",
        "The build hurts here: use another --init, or lower --lr so that training keeps what was built.",
    )  # fmt: skip


def training_gained_nothing(report: Report) -> Finding | None:
    """Report training that did not bring the student closer to its teacher; the built student is exported then."""
    choice = report.get("choice") or {}
    if choice.get("exported") != "built":
        return None
    kl = choice["kl"]
    return finding(
        "training_gained_nothing", "error", "Training gained nothing",
        f"KL to the teacher was {show_number(kl['built'])} before training and {show_number(kl['last'])} after {choice['steps']} steps; "
        f"the student as it was built is exported.",
        "Train on more and more varied text (--tokens), or with a lower --lr; --tokens 0 saves the time.",
    )  # fmt: skip


def later_steps_hurt(report: Report) -> Finding | None:
    """Report a training that went past its best."""
    choice = report.get("choice") or {}
    kl = choice.get("kl") or {}
    if choice.get("exported") != "best" or kl["last"] < 1.05 * kl["best"]:
        return None
    return finding(
        "later_steps_hurt", "warning", "The last steps of training made it worse",
        f"KL to the teacher was {show_number(kl['best'])} at step {choice['step']} of {choice['steps']}, which is exported, and "
        f"{show_number(kl['last'])} at the end.",
        "Train on more text (--tokens) for fewer --epochs, or with a lower --lr.",
    )  # fmt: skip


def mode_collapse(report: Report) -> Finding | None:
    """Report predictions that are far more certain than the teacher's."""
    gap, entropy = _score(report, "entropy_gap"), _score(report, "entropy")
    if gap is None or entropy is None or entropy - gap <= 0 or gap > -0.3 * (entropy - gap):
        return None
    return finding(
        "mode_collapse", "error", "Mode collapse",
        f"The student's predictions have {entropy:.2f} nats of entropy, the teacher's {entropy - gap:.2f}.",
        "Train with forward KL (reverse KL seeks modes), and lower the weight of hard labels.",
    )  # fmt: skip


def capacity_gap(report: Report) -> Finding | None:
    """Report a small student that does not fit even the text it was trained on."""
    ratio, kl = (report.get("cost") or {}).get("active_ratio"), _score(report, "kl")
    train = score_value(report.get("train_scores"), "kl")
    fitted = kl if train is None else train
    if ratio is None or fitted is None or ratio >= ACTIVE_SHARE or fitted < HIGH_KL:
        return None
    return finding(
        "capacity_gap", "warning", "Capacity gap",
        f"The student has {show_percent(ratio)} of the parameters that a token passes in the teacher, and stays {fitted:.2f} nats "
        f"away{' even on text it was trained on' if train is not None else ''}.",
        "Choose a larger --to, or distil in two stages, through a student of a size in between.",
    )  # fmt: skip


def temperature_too_high(report: Report) -> Finding | None:
    """Report a student that was trained at a high temperature and is flatter than the teacher."""
    temperature, gap = _train_options(report).get("temperature", 1.0), _score(report, "entropy_gap")
    if temperature < 1.5 or gap is None or gap < 0.1:
        return None
    return finding(
        "temperature_too_high", "warning", "Temperature too high",
        f"Trained at temperature {temperature:g}; the student's predictions are {gap:.2f} nats flatter than the teacher's.",
        "Distil at temperature 1, or let it fall to 1 before the end.",
    )  # fmt: skip


def alpha_out_of_balance(report: Report) -> Finding | None:
    """Report hard labels that pull the student away: likelihood improves while the distance to the teacher grows."""
    alpha, evaluations = _train_options(report).get("alpha", 0.0), _evaluations(report, "valid_kl", "valid_nll")
    if not alpha or len(evaluations) < 2:
        return None
    (best_kl, nll_then), (last_kl, last_nll) = min(evaluations, key=lambda e: e[0]), evaluations[-1]
    if not (last_kl > 1.05 * best_kl and last_nll < nll_then):
        return None
    return finding(
        "alpha_out_of_balance", "warning", "Hard labels outweigh the teacher",
        f"With alpha {alpha:g}, KL to the teacher rose from {best_kl:.3f} to {last_kl:.3f} while the likelihood of the text still "
        f"improved.",
        "Lower alpha; 0 follows the teacher alone.",
    )  # fmt: skip


def rare_tokens_suffer(report: Report) -> Finding | None:
    """Report KL on rare tokens that rises while KL over all tokens falls."""
    evaluations = _evaluations(report, "valid_kl", "valid_rare_kl")
    if len(evaluations) < 2:
        return None
    (first_kl, _), (last_kl, last_rare_kl) = evaluations[0], evaluations[-1]
    lowest = min(rare_kl for _, rare_kl in evaluations)
    if not (last_kl < first_kl and last_rare_kl > 1.05 * lowest):
        return None
    return finding(
        "rare_tokens_suffer", "warning", "Rare tokens get worse while the average improves",
        f"KL fell from {first_kl:.3f} to {last_kl:.3f}; on rare tokens it rose from {lowest:.3f} to {last_rare_kl:.3f}.",
        "Stop earlier, train on more varied text, or use a loss that keeps the tail (forward KL on full targets).",
    )  # fmt: skip


def judged_by_training_text(report: Report) -> Finding | None:
    """Report held-out text that was also trained on."""
    share = (((report.get("run") or {}).get("data") or {}).get("valid") or {}).get("seen_in_training")
    if share is None or share < SEEN_IN_TRAINING:
        return None
    return finding(
        "judged_by_training_text", "error", "Judged by text it was trained on",
        f"{show_percent(share)} of the held-out text stands word for word in the training text too.",
        "Give held-out text of its own (--valid): these scores say how well the text was learnt by heart.",
    )  # fmt: skip


def memorised(report: Report) -> Finding | None:
    """Report a student that is much closer to the teacher on its training text than on held-out text."""
    kl, train = _score(report, "kl", all_domains=True), score_value(report.get("train_scores"), "kl")
    if kl is None or train is None or kl < MEMORISED * train or kl - train < 0.02:
        return None
    return finding(
        "memorised", "warning", "Memorised its training text",
        f"KL is {train:.3f} on text it was trained on and {kl:.3f} on held-out text.",
        "More unique tokens (--tokens) bring other text closer; scores on benchmarks that are in the training text do not count.",
    )  # fmt: skip


def far_on_other_text(report: Report) -> Finding | None:
    """Report a student that follows its teacher only on text like that it was trained on."""
    kl, other = _score(report, "kl"), _ood_scores(report).get("kl") or {}
    if kl is None or other.get("low") is None or other["low"] < 2 * kl:
        return None
    path = ood_path(report)
    return finding(
        "far_on_other_text", "warning", "Far from the teacher on other text",
        f"KL is {kl:.3f} on held-out text and {other['value']:.3f} on the out-of-distribution text{f' ({path})' if path else ''}.",
        "If the student is to serve such text, add text of that kind to --data; otherwise ignore this.",
    )  # fmt: skip


def experts_unmeasured(report: Report) -> Finding | None:
    """Report many experts that saw too little held-out text to be measured."""
    totals = transfer_totals(report)
    total, measured = totals.get("experts"), totals.get("measured")
    if not total or measured is None or total - measured <= UNMEASURED_SHARE * total:
        return None
    return finding(
        "experts_unmeasured", "warning", "Many experts are unmeasured",
        f"{total - measured} of {total} experts saw too few held-out tokens.",
        "Evaluate on more text, or on text of the domains that those experts serve.",
    )  # fmt: skip


RULES: tuple[Callable[[Report], Finding | None], ...] = (
    tokenizer_mismatch,
    broken_student,
    worse_than_control,
    training_gained_nothing,
    later_steps_hurt,
    mode_collapse,
    capacity_gap,
    temperature_too_high,
    alpha_out_of_balance,
    rare_tokens_suffer,
    judged_by_training_text,
    memorised,
    far_on_other_text,
    experts_unmeasured,
    *BUILD_RULES,
)
