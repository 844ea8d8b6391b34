"""The report as one dict, report.json: what a run measured, under a versioned schema. Rendering reads nothing else."""

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe2dense.common.jsonable import clean
from moe2dense.config.schema import RunConfig
from moe2dense.errors import UserError
from moe2dense.evaluation.retention import gap_closed, split_domains
from moe2dense.evaluation.scores import Scores
from moe2dense.reporting.definitions import ROW_TITLES
from moe2dense.reporting.diagnosis import diagnose
from moe2dense.reporting.report_file import SCHEMA, Report


def assemble_report(
    *,
    config: RunConfig,
    plan: Mapping[str, Any],
    student: Mapping[str, Any],
    rows: Mapping[str, Scores],
    ood: Mapping[str, Scores] | None = None,
    build: Sequence[Mapping[str, Any]] = (),
    choice: Mapping[str, Any] | None = None,
    last: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    control_history: Sequence[Mapping[str, Any]] = (),
    transfer: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    timings: Mapping[str, float] | None = None,
    cost: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    command: Sequence[str] | str = "",
    allow_loss: Sequence[str] = (),
    samples: Mapping[str, Any] | None = None,
    skills: Mapping[str, Any] | None = None,
    train_scores: Scores | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_remarks: Sequence[str] = (),
) -> Report:
    """Gather everything a run has to say as plain JSON values. Only `config`, `plan`, `student` and `rows` are needed.

    plan: `Plan.to_dict()`. student: {"parameters", "bytes" (exported), "architecture", "method" (init), "width", "layers",
    "moe_shaped"}; more keys are shown as they are. rows: Scores by "teacher", "student" (required), "before", "control", and
    any baseline under the name to show; all from one Reference. ood: the same rows on out-of-distribution text.
    build: the build's records (student/build). choice: `Choice.to_dict()`: which student is exported, where one was trained.
    last: {"valid", "ood"}: `Scores.to_dict()` of the last training step, where another student is exported; under allow_loss
    with "apart": {"kept", "lost"}, the same without those domains and on them alone.
    history: the records of metrics.jsonl: "step", "tokens", "loss", optional parts under "parts" (name -> value), "lr",
    "tokens_per_second", and at evaluations "valid_kl", "valid_rare_kl", "valid_nll"; control_history: the control's.
    transfer: `Transfer.to_dict()`. timings: seconds by stage. cost: `Cost.to_dict()` by stage. hashes: file or stage -> hash.
    data: {"train"|"valid"|"ood": {"path", "blocks", "tokens"}}. samples: what `side_by_side` returns.
    skills: what `measure_skills` returns.
    allow_loss: domains the user allows to be lost. "apart" has every row without them and on them alone, and
    `retention.kept` leaves them out.
    train_scores: the student on text it was trained on (memorisation). tokenizer: gives the worst tokens their text.
    teacher_remarks: sentences on what the teacher's folder holds and is not used.
    Raises UserError where the student's row is missing.
    """
    if "student" not in rows:
        raise UserError("rows: the report needs at least the student's scores under 'student'")
    report: Report = {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "teacher": {**_teacher(plan), "remarks": list(teacher_remarks)},
        "student": {"bytes": _exported_bytes(config, student), **student},
        "cost": _cost(plan, student),
        "choice": dict(choice) if choice else None,
        "build": [dict(r) for r in build],
        "rows": _in_order(rows, (last or {}).get("valid")),
        "ood": _in_order(ood or {}, (last or {}).get("ood")),
        "apart": _apart(rows, ood or {}, allow_loss, last or {}),
        "retention": _retention(rows, allow_loss),
        "history": [dict(r) for r in history],
        "control_history": [dict(r) for r in control_history],
        "transfer": dict(transfer) if transfer else None,
        "train_scores": train_scores.to_dict() if train_scores else None,
        "samples": dict(samples) if samples else None,
        "skills": dict(skills) if skills else None,
        "tokens": _token_texts(rows, tokenizer),
        "run": {
            "command": command if isinstance(command, str) else shlex.join(command),
            "config": dataclasses.asdict(config),
            "plan": dict(plan),
            "versions": dict(versions or {}),
            "timings": dict(timings or {}),
            "cost": dict(cost or {}),
            "hashes": dict(hashes or {}),
            "data": dict(data or {}),
        },
    }
    report = clean(report)
    report["diagnosis"] = diagnose(report)
    return report


def _in_order(rows: Mapping[str, Scores], last: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return teacher, student, before, last step, control, then baselines as given."""
    plain = {name: scores.to_dict() for name, scores in rows.items()}
    if last and plain:
        plain["last"] = {k: v for k, v in last.items() if k != "apart"}
    known = [n for n in ROW_TITLES if n in plain]
    return {n: plain[n] for n in [*known, *(n for n in plain if n not in known)]}


def _apart(
    rows: Mapping[str, Scores], ood: Mapping[str, Scores], allow_loss: Sequence[str], last: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return {"domains", "held_out": {"kept": rows, "lost": rows}, "ood": the same or None}; None where nothing may be lost."""
    if not allow_loss:
        return None
    parts = {"held_out": (rows, last.get("valid")), "ood": (ood, last.get("ood"))}
    return {"domains": list(allow_loss)} | {
        k: split_rows(scores, allow_loss, row) for k, (scores, row) in parts.items()
    }


def split_rows(
    rows: Mapping[str, Scores], domains: Sequence[str], last: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]] | None:
    """Return rows of scores without `domains` ("kept") and on them alone ("lost").

    last: the row of the last training step, split already under "apart". None where the text has none of them or nothing else.
    """
    parts = {name: split_domains(scores, domains) for name, scores in rows.items()}
    known = {name: part for name, part in parts.items() if part is not None}
    if not known:
        return None
    apart = (last or {}).get("apart") or {}
    return {
        side: _in_order({n: part[i] for n, part in known.items()}, apart.get(side))
        for i, side in enumerate(("kept", "lost"))
    }


def _token_texts(rows: Mapping[str, Scores], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Return the text of every token that a table of worst tokens names."""
    if tokenizer is None:
        return {}
    ids = {row["id"] for scores in rows.values() for row in scores.worst_tokens}
    return {str(i): tokenizer.decode([i]) for i in sorted(ids)}


def _exported_bytes(config: RunConfig, student: Mapping[str, Any]) -> int | None:
    size = {"bfloat16": 2, "float16": 2, "float32": 4}.get(config.export.dtype)
    return size * student["parameters"] if size and student.get("parameters") and not config.export.quantize else None


def _teacher(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": plan.get("teacher", ""), "bytes": plan.get("checkpoint_bytes"), **dict(plan.get("shape", {}))}


def _cost(plan: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    shape, spent = plan.get("shape", {}), plan.get("flops") or 0
    teacher_size, active, student_size = (
        shape.get("parameters"),
        shape.get("active_parameters"),
        student.get("parameters"),
    )
    cost: dict[str, Any] = {"tokens": plan.get("tokens"), "build_tokens": plan.get("build_tokens")}
    if plan.get("tokens") and plan.get("extra"):
        written = round(plan["tokens"] * plan["extra"])
        cost |= {"tokens": plan["tokens"] + written, "written_tokens": written}
    if teacher_size and student_size:
        ratios = {
            "parameters_ratio": student_size / teacher_size,
            "active_ratio": student_size / (active or teacher_size),
        }
        cost |= ratios
    if spent and plan.get("from_scratch"):
        cost |= {"flops": spent, "scratch_ratio": spent / plan["from_scratch"]}
    return cost


def _retention(rows: Mapping[str, Scores], allow_loss: Sequence[str]) -> dict[str, Any] | None:
    control = rows.get("control")
    if control is None:
        return {"allow_loss": list(allow_loss)} if allow_loss else None
    closed = gap_closed(rows["student"], control)
    without_lost = gap_closed(rows["student"], control, without=allow_loss) if allow_loss else closed
    return {
        "overall": closed["overall"].to_dict(),
        "kept": without_lost["overall"].to_dict(),
        "by_domain": {d: e.to_dict() for d, e in closed["by_domain"].items()},
        "allow_loss": list(allow_loss),
    }
