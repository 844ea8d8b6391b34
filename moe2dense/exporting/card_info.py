"""Take from a report what the model card of the exported student repeats."""

from collections.abc import Mapping
from typing import Any

from moe2dense.config.toml import write_config_table

_ROWS = {"student": "student", "before": "student before training", "control": "random FFNs, trained alike"}


def card_info(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a model card (exporting/model_card.py, INFO_FIELDS) from a run's report."""
    run, student, cost = report["run"], report["student"], report["cost"]
    plan, config = run["plan"], run["config"]
    rows = [{"name": shown, "scores": report["rows"][name]} for name, shown in _ROWS.items() if name in report["rows"]]
    text = run["data"].get("train", {}).get("path", "")
    return {
        "name": f"{report['teacher']['name']} as a dense {student['architecture']}",
        "teacher": plan["source"],
        "datasets": [text] if text else [],
        "target": config["to"],
        "method": student["method"],
        "tokens": cost["tokens"],
        "written_tokens": cost.get("written_tokens", 0),
        "replayed": round(cost["tokens"] * config["train"]["epochs"]),
        "seed": config["seed"],
        "rows": rows,
        "tokens_judged": report["rows"]["student"]["tokens"],
        "transferred": _transferred(report),
        "lost": lost(report),
        "command": run["command"],
        "config": write_config_table(config),
        "versions": run["versions"],
    }


def _transferred(report: Mapping[str, Any]) -> float | None:
    model = (report.get("transfer") or {}).get("model") or {}
    return model.get("transferred")


def lost(report: Mapping[str, Any], most: int = 3) -> list[str]:
    """Return sentences on where the student is furthest from its teacher: domains, then diagnoses."""
    domains = report["rows"]["student"]["by_domain"]
    worst = sorted((d for d in domains if d), key=lambda d: -domains[d]["kl"]["value"])[:most]
    sentences = []
    if len(worst) > 1:
        shown = ", ".join(f"{d} ({domains[d]['kl']['value']:.3f} nats/token)" for d in worst)
        sentences.append(f"Furthest from the teacher on: {shown}.")
    allowed = (report.get("apart") or {}).get("domains")
    if allowed:
        sentences.append(f"Allowed to be lost, and reported apart: {', '.join(allowed)}.")
    return sentences + [d["finding"] for d in report.get("diagnosis", [])]
