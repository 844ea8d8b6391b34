"""Known ways a distillation goes wrong, named when the numbers show them, with the number and the remedy.

Every rule reads the report dict alone and stays silent where its numbers are missing.
"""

import math
from collections.abc import Callable
from typing import Any

Report = dict[str, Any]
Finding = dict[str, str]

TOKENS_PER_NEURON = 20  # calibration tokens below which a least-squares refit of one layer is poorly determined
ACTIVE_SHARE = 0.5  # student parameters over the teacher's active ones, below which capacity is the first suspect
HIGH_KL = 0.3  # nats per token
MEMORISED = 1.5  # held-out KL over training KL
UNMEASURED_SHARE = 0.25


def diagnose(report: Report) -> list[Finding]:
    """Findings as {"id", "severity": "error" | "warning", "title", "finding", "remedy"}, errors first."""
    found = [f for rule in RULES if (f := rule(report)) is not None]
    return sorted(found, key=lambda f: f["severity"] != "error")


def _finding(id: str, severity: str, title: str, finding: str, remedy: str) -> Finding:
    return {"id": id, "severity": severity, "title": title, "finding": finding, "remedy": remedy}


def _row(report: Report, name: str, everything: bool = False) -> float | None:
    """A number of the student's row, without the domains that may be lost unless `everything` is asked for."""
    kept = None if everything else ((report.get("apart") or {}).get("held_out") or {}).get("kept")
    return (((kept or report.get("rows") or {}).get("student") or {}).get(name) or {}).get("value")


def _ood(report: Report) -> dict[str, Any]:
    """The student's numbers on out-of-distribution text, without the domains that may be lost."""
    kept = ((report.get("apart") or {}).get("ood") or {}).get("kept")
    return (kept or report.get("ood") or {}).get("student") or {}


def _train(report: Report) -> dict[str, Any]:
    return ((report.get("run") or {}).get("config") or {}).get("train") or {}


def _evaluations(report: Report, *keys: str) -> list[list[float]]:
    rows = [[r.get(k) for k in keys] for r in report.get("history") or []]
    return [r for r in rows if all(v is not None for v in r)]


def tokenizer_mismatch(report: Report) -> Finding | None:
    """The teacher itself cannot predict the text: less than a tenth below a uniform guess."""
    nll, vocabulary = _row(report, "teacher_nll"), (report.get("teacher") or {}).get("vocab_size")
    if nll is None or not vocabulary or nll < 0.9 * math.log(vocabulary):
        return None
    return _finding(
        "tokenizer_mismatch", "error", "Tokenizer mismatch",
        f"The teacher's own loss on this text is {nll:.2f} nats, about a uniform guess over {vocabulary} tokens "
        f"({math.log(vocabulary):.2f}).",
        "Tokenise the data with the teacher's own tokenizer, and check that its checkpoint is whole.",
    )  # fmt: skip


def broken_student(report: Report) -> Finding | None:
    """The student is worse than a uniform guess where the teacher is not."""
    nll, vocabulary = _row(report, "nll"), (report.get("teacher") or {}).get("vocab_size")
    if nll is None or not vocabulary or nll < math.log(vocabulary) or tokenizer_mismatch(report):
        return None
    return _finding(
        "broken_student", "error", "The student predicts worse than chance",
        f"Its loss is {nll:.2f} nats; a uniform guess over {vocabulary} tokens has {math.log(vocabulary):.2f}.",
        "Training has diverged or weights are missing: lower --lr, and compare with the student before training.",
    )  # fmt: skip


def worse_than_control(report: Report) -> Finding | None:
    """The whole interval of the gap closed lies below zero."""
    share = (report.get("retention") or {}).get("kept") or (report.get("retention") or {}).get("overall") or {}
    if share.get("high") is None or share["high"] >= 0:
        return None
    return _finding(
        "worse_than_control", "error", "Worse than starting from random weights",
        f"The gap closed against the control is {100 * share['value']:.0f} %, and its interval ends at {100 * share['high']:.0f} %.",
        "The construction hurts here: use another --init, or lower --lr so that training keeps what was built.",
    )  # fmt: skip


def mode_collapse(report: Report) -> Finding | None:
    """The student is far surer of itself than the teacher."""
    gap, own = _row(report, "entropy_gap"), _row(report, "entropy")
    if gap is None or own is None or own - gap <= 0 or gap > -0.3 * (own - gap):
        return None
    return _finding(
        "mode_collapse", "error", "Mode collapse",
        f"The student's predictions carry {own:.2f} nats of entropy, the teacher's {own - gap:.2f}.",
        "Train with forward KL (reverse KL seeks modes), and lower the weight of hard labels.",
    )  # fmt: skip


def capacity_gap(report: Report) -> Finding | None:
    """A small student that does not fit even the text it was trained on."""
    ratio, kl = (report.get("cost") or {}).get("active_ratio"), _row(report, "kl")
    train = ((report.get("train_scores") or {}).get("kl") or {}).get("value")
    fitted = kl if train is None else train
    if ratio is None or fitted is None or ratio >= ACTIVE_SHARE or fitted < HIGH_KL:
        return None
    return _finding(
        "capacity_gap", "warning", "Capacity gap",
        f"The student has {100 * ratio:.0f} % of the parameters a token passes in the teacher, and stays {fitted:.2f} nats away "
        f"{'even on text it was trained on' if train is not None else 'from it'}.",
        "Choose a larger --to, or distil in two stages through a student of a size in between.",
    )  # fmt: skip


def temperature_too_high(report: Report) -> Finding | None:
    """Trained at a high temperature, and flatter than the teacher."""
    temperature, gap = _train(report).get("temperature", 1.0), _row(report, "entropy_gap")
    if temperature < 1.5 or gap is None or gap < 0.1:
        return None
    return _finding(
        "temperature_too_high", "warning", "Temperature too high",
        f"Trained at temperature {temperature:g}; the student's predictions are {gap:.2f} nats flatter than the teacher's.",
        "Distil at temperature 1, or let it fall to 1 before the end.",
    )  # fmt: skip


def alpha_out_of_balance(report: Report) -> Finding | None:
    """Hard labels pull the student away: its likelihood improves while its distance to the teacher grows."""
    alpha, seen = _train(report).get("alpha", 0.0), _evaluations(report, "valid_kl", "valid_nll")
    if not alpha or len(seen) < 2:
        return None
    best = min(range(len(seen)), key=lambda i: seen[i][0])
    if not (seen[-1][0] > 1.05 * seen[best][0] and seen[-1][1] < seen[best][1]):
        return None
    return _finding(
        "alpha_out_of_balance", "warning", "Hard labels outweigh the teacher",
        f"With alpha {alpha:g}, KL to the teacher rose from {seen[best][0]:.3f} to {seen[-1][0]:.3f} while the likelihood of the text "
        f"still improved.",
        "Lower alpha; 0 follows the teacher alone.",
    )  # fmt: skip


def rare_tokens_suffer(report: Report) -> Finding | None:
    """KL falls while KL on rare tokens rises."""
    seen = _evaluations(report, "valid_kl", "valid_rare_kl")
    if len(seen) < 2:
        return None
    low = min(r[1] for r in seen)
    if not (seen[-1][0] < seen[0][0] and seen[-1][1] > 1.05 * low):
        return None
    return _finding(
        "rare_tokens_suffer", "warning", "Rare tokens get worse while the average improves",
        f"KL fell from {seen[0][0]:.3f} to {seen[-1][0]:.3f}; on rare tokens it rose from {low:.3f} to {seen[-1][1]:.3f}.",
        "Stop earlier, train on more varied text, or use a loss that keeps the tail (forward KL on full targets).",
    )  # fmt: skip


def memorised(report: Report) -> Finding | None:
    """Much closer to the teacher on training text than on held-out text."""
    kl, train = _row(report, "kl", everything=True), ((report.get("train_scores") or {}).get("kl") or {}).get("value")
    if kl is None or train is None or kl < MEMORISED * train or kl - train < 0.02:
        return None
    return _finding(
        "memorised", "warning", "Memorised its training text",
        f"KL is {train:.3f} on text it was trained on and {kl:.3f} on held-out text.",
        "More unique tokens (--tokens) bring other text closer; scores on benchmarks that are in the training text do not count.",
    )  # fmt: skip


def few_calibration_tokens(report: Report) -> Finding | None:
    """The build's least-squares problems have few tokens per unknown."""
    tokens, width = (report.get("cost") or {}).get("build_tokens"), (report.get("student") or {}).get("width")
    if (report.get("student") or {}).get("method") == "random" or not tokens or not width:
        return None
    if tokens >= TOKENS_PER_NEURON * width:
        return None
    return _finding(
        "few_calibration_tokens", "warning", "Few calibration tokens",
        f"The student was built from {tokens} tokens for {width} neurons a layer; {TOKENS_PER_NEURON} a neuron "
        f"({TOKENS_PER_NEURON * width}) are advisable.",
        "Raise --tokens, of which the build takes a share.",
    )  # fmt: skip


def far_on_other_text(report: Report) -> Finding | None:
    """The student follows its teacher only on text like that it was trained on."""
    kl, other = _row(report, "kl"), _ood(report).get("kl") or {}
    if kl is None or other.get("low") is None or other["low"] < 2 * kl:
        return None
    return _finding(
        "far_on_other_text", "warning", "Far from the teacher on other text",
        f"KL is {kl:.3f} on held-out text and {other['value']:.3f} on out-of-distribution text.",
        "Add text of the missing kind to --data.",
    )  # fmt: skip


def experts_unmeasured(report: Report) -> Finding | None:
    """Too little held-out text to say what became of many experts."""
    model = (report.get("transfer") or {}).get("model") or {}
    total, measured = model.get("experts"), model.get("measured")
    if not total or measured is None or total - measured <= UNMEASURED_SHARE * total:
        return None
    return _finding(
        "experts_unmeasured", "warning", "Many experts are unmeasured",
        f"{total - measured} of {total} experts saw too few held-out tokens.",
        "Evaluate on more text, or on text of the domains those experts serve.",
    )  # fmt: skip


RULES: tuple[Callable[[Report], Finding | None], ...] = (
    tokenizer_mismatch,
    broken_student,
    worse_than_control,
    mode_collapse,
    capacity_gap,
    temperature_too_high,
    alpha_out_of_balance,
    rare_tokens_suffer,
    memorised,
    few_calibration_tokens,
    far_on_other_text,
    experts_unmeasured,
)
