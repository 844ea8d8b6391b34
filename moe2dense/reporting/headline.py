"""What stands at the top of the page: the result in a few sentences, both models' facts, and the large figures."""

from typing import Any

from moe2dense.common.numbers import show_number, show_percent
from moe2dense.common.units import show_bytes, show_count
from moe2dense.reporting.definitions import MODEL
from moe2dense.reporting.report_file import Report, score_value, transfer_totals


def summary(report: Report) -> str:
    """Say the result in words; every clause only where its number exists."""
    sentences = [s for s in (choice_sentence(report),) if s]
    student = report["rows"].get("student")
    kl, nll, teacher_nll = (score_value(student, k) for k in ("kl", "nll", "teacher_nll"))
    if kl is not None:
        lost = "."
        if nll is not None and teacher_nll is not None:
            lost = f", and it loses {show_number(max(nll - teacher_nll, 0))} nats of likelihood on held-out text."
        sentences.append(f"The student's next-token distribution is {show_number(kl)} nats from the teacher's{lost}")
    share = score_value(report.get("retention"), "overall")
    if share is not None:
        sentences.append(
            f"It closes {show_percent(share, 1)} of the gap between the teacher and a control that is trained alike from random FFNs"
            f"{_without_lost(report)}."
        )
    totals = transfer_totals(report)
    if totals.get("reproduced") is not None:
        sentences.append(
            f"Given the same inputs, its FFN layers reproduce {show_percent(totals['reproduced'])} of the expert blocks' output."
        )
    return " ".join(sentences)


def choice_sentence(report: Report) -> str:
    """Say which student is exported, and why, where it is not the last training step's; "" where it is."""
    choice = report.get("choice") or {}
    kl = {name: show_number(value) for name, value in (choice.get("kl") or {}).items()}
    match choice.get("exported"):
        case "built":
            trained = kl["last"] if "best" not in kl else f"{kl['last']} at the last step, {kl['best']} at best"
            return (
                "Training gained nothing, so the student is exported as it was built: its KL to the teacher was "
                f"{kl['built']} before training and {trained} after it."
            )
        case "best":
            return (
                f"The student of training step {choice['step']} of {choice['steps']} is exported, which was closest to the teacher: "
                f"KL {kl['best']}, at the last step {kl['last']}, before training {kl['built']}."
            )
        case _:
            return ""


def _without_lost(report: Report) -> str:
    """Return ' (93% without code, which may be lost)' where domains may be lost and the text has them."""
    share = score_value(report.get("retention"), "kept")
    if share is None or not (report.get("apart") or {}).get("held_out"):
        return ""
    return f" ({show_percent(share, 1)} without {listed(report['apart']['domains'])}, which may be lost)"


def listed(names: list[str]) -> str:
    """Return 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def teacher_facts(teacher: dict[str, Any]) -> list[str]:
    """Return short lines on the teacher's size and shape."""
    facts = []
    if teacher.get("parameters"):
        active = show_count(teacher["active_parameters"])
        facts.append(f"{show_count(teacher['parameters'])} parameters, {active} per token")
    if teacher.get("num_experts"):
        shared = ", plus shared experts" if teacher.get("shared_width") else ""
        facts.append(f"{teacher['num_experts']} experts a layer, top-{teacher['top_k']}{shared}")
    if teacher.get("num_hidden_layers"):
        facts.append(f"{teacher['num_hidden_layers']} layers × {teacher['hidden_size']}")
    if teacher.get("bytes"):
        facts.append(f"{show_bytes(teacher['bytes'])} on disk")
    return facts


def student_facts(student: dict[str, Any]) -> list[str]:
    """Return short lines on the student's size and shape, and how it was built."""
    facts = []
    if student.get("parameters"):
        facts.append(f"{show_count(student['parameters'])} parameters, all of them per token")
    if student.get("width"):
        facts.append(f"one dense FFN a layer, {student['width']} wide")
    if student.get("moe_shaped"):
        facts.append("keeps an MoE wrapper around one expert")
    if student.get("method"):
        facts.append(f"built by {student['method']}")
    if student.get("bytes"):
        facts.append(f"{show_bytes(student['bytes'])} exported")
    return facts


def tiles(report: Report) -> list[dict[str, str]]:
    """Return the large figures: value, what it is, a small line under it, and the definition."""
    row, cost, totals = report["rows"]["student"], report.get("cost") or {}, transfer_totals(report)
    figures = []
    if totals.get("reproduced") is not None:
        before = totals.get("reproduced_before")
        note = f"before training {show_percent(before)}" if before is not None else "given the same inputs"
        label = "of the expert blocks' output reproduced"
        figures.append(_tile(label, show_percent(totals["reproduced"]), note, "reproduced"))
    figures += [
        _tile("KL to the teacher, nats/token", show_number(row["kl"]["value"]), interval(row["kl"]), "kl"),
        _tile(
            "same first choice", show_percent(row["agreement"]["value"], 1), interval(row["agreement"], "%"), "agreement"
        ),
        _tile(
            "perplexity", show_number(row["perplexity"]["value"]),
            f"teacher {show_number(row['teacher_perplexity']['value'])}", "perplexity",
        ),
    ]  # fmt: skip
    if cost.get("parameters_ratio") is not None:
        active = cost.get("active_ratio")
        note = f"compute per token {show_number(active)} × the teacher's" if active is not None else ""
        figures.append(_tile("of the teacher's parameters", show_percent(cost["parameters_ratio"]), note))
    return figures


def _tile(label: str, value: str, note: str, key: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "help": MODEL[key].help if key else ""}


def interval(estimate: dict[str, Any], unit: str = "") -> str:
    """Return '95% interval 0.098 to 0.114' of an estimate, or why there is none."""
    if estimate.get("low") is None:
        return "no interval: one passage"
    low, high = (show_in(unit, estimate[end]) for end in ("low", "high"))
    return f"95% interval {low} to {high}"


def show_in(unit: str, x: float | None) -> str:
    """Show a number in its metric's unit: '%' for a share of 1."""
    return show_percent(x, 1) if unit == "%" else show_number(x)
