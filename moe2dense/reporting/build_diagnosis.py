"""Ways in which a build goes wrong, read from its records: fits that kept nothing, layers that got lost, too little text."""

from typing import Any

from moe2dense.common.numbers import show_number
from moe2dense.reporting.report_file import Finding, Report, finding

TOKENS_PER_NEURON = 20  # calibration tokens below which the fits of one layer learn their text by heart
KEPT_NOTHING_SHARE = 0.1  # of the layers' fits, from which on it is said
LOST_SHARE = 0.25  # of the layers, from which on lost ones are an error
FITS = {"local": "FFN fits", "layer": "fits of whole layers"}


def layer_records(report: Report) -> list[dict[str, Any]]:
    """Return the build's last record of every layer, in order."""
    last = {r["layer"]: r for r in report.get("build") or [] if "layer" in r}
    return [last[i] for i in sorted(last)]


def heal_record(report: Report) -> dict[str, Any]:
    """Return the record of the end-to-end fit; empty where there is none."""
    return next((r for r in report.get("build") or [] if any(key.startswith("heal_") for key in r)), {})


def tokens_wanted(report: Report) -> int | None:
    """Return the calibration tokens that the student's width asks for, where the build had fewer; None where it had enough."""
    tokens, width = (report.get("cost") or {}).get("build_tokens"), (report.get("student") or {}).get("width")
    if (report.get("student") or {}).get("method") == "random" or not tokens or not width:
        return None
    return TOKENS_PER_NEURON * width if tokens < TOKENS_PER_NEURON * width else None


def more_text(report: Report, wanted: int) -> str:
    """Return the remedy that gives the build `wanted` tokens: what keeps it from them now."""
    config = (report.get("run") or {}).get("config") or {}
    most, tokens = (config.get("build") or {}).get("max_tokens"), (config.get("train") or {}).get("tokens")
    loaded = (((report.get("run") or {}).get("data") or {}).get("train") or {}).get("tokens")
    steps = []
    if loaded and tokens and loaded < min(wanted, tokens):
        steps.append(f"add text to --data, which has {loaded:,} tokens")
    if tokens is not None and tokens < wanted:
        steps.append(f"set --tokens to {wanted:,} or more")
    if most is not None and most < wanted:
        steps.append(f"set build.max_tokens to {wanted:,} or more in a --config file")
    if not steps:
        steps.append(f"set build.min_tokens to {wanted:,} in a --config file")
    text = ", and ".join(steps)
    return text[0].upper() + text[1:] + "."


def few_calibration_tokens(report: Report) -> Finding | None:
    """Report a build whose fits have few tokens per unknown."""
    wanted = tokens_wanted(report)
    if wanted is None:
        return None
    width = report["student"]["width"]
    return finding(
        "few_calibration_tokens", "warning", "Few calibration tokens",
        f"The student was built from {report['cost']['build_tokens']:,} tokens for {width:,} neurons a layer; {TOKENS_PER_NEURON} a "
        f"neuron ({wanted:,}) are advisable.",
        more_text(report, wanted),
    )  # fmt: skip


def fits_kept_nothing(report: Report) -> Finding | None:
    """Report fits of layers that were computed and thrown away, as no step of theirs helped on held-out text."""
    parts, share = [], 0.0
    for key, title in FITS.items():
        steps = [r[f"{key}_best_step"] for r in layer_records(report) if r.get(f"{key}_best_step") is not None]
        if none := steps.count(0):
            parts.append(f"{none} of {len(steps)} {title}")
            share = max(share, none / len(steps))
    if share < KEPT_NOTHING_SHARE:
        return None
    wanted = tokens_wanted(report)
    remedy = (
        "Lower build.local_lr and build.layer_lr, or leave these fits out (--init obs+refit+heal): they cost time and bring nothing."
        if wanted is None
        else more_text(report, wanted)
    )
    return finding(
        "fits_kept_nothing", "warning", "Fits of the build kept nothing",
        f"{' and '.join(parts)} ended where they began: no step was better on held-out text.", remedy,
    )  # fmt: skip


def layers_lost(report: Report) -> Finding | None:
    """Report layers of the built student that are further from the teacher's than a layer that does nothing."""
    errors = {r["layer"]: r["error"] for r in layer_records(report) if r.get("error") is not None}
    lost = {layer: error for layer, error in errors.items() if error > 1}
    if not lost:
        return None
    worst = max(lost, key=lambda layer: lost[layer])
    first = min(lost)
    more = more_text(report, wanted) if (wanted := tokens_wanted(report)) else "Raise --to or --tokens."
    return finding(
        "layers_lost", "error" if len(lost) > LOST_SHARE * len(errors) else "warning", "Layers got lost in the build",
        f"{len(lost)} of {len(errors)} layers, from layer {first} on, missed by more than the whole change that the teacher's layer "
        f"makes (error over 1); the worst is layer {worst} with {show_number(lost[worst])}.",
        f"{more} Errors add up over the layers behind; the chart of errors by depth shows what training has mended.",
    )  # fmt: skip


def heal_kept_nothing(report: Report) -> Finding | None:
    """Report an end-to-end fit that ended where it began."""
    record = heal_record(report)
    if record.get("heal_best_step") != 0:
        return None
    kl = record.get("heal_kl_before")
    shown = "" if kl is None else f", at a KL of {show_number(kl)} on the build's held-out text"
    wanted = tokens_wanted(report)
    return finding(
        "heal_kept_nothing", "warning", "The end-to-end fit of the build kept nothing",
        f"It kept step 0{shown}: no step was better on held-out text.",
        more_text(report, wanted) if wanted else "Lower build.heal_lr, which is set in a --config file.",
    )  # fmt: skip


def heal_left_out(report: Report) -> Finding | None:
    """Report an end-to-end fit that memory did not allow."""
    reason = heal_record(report).get("heal_skipped")
    if not reason:
        return None
    return finding(
        "heal_left_out", "warning", "The end-to-end fit of the build was left out",
        f"1 step of the recipe is missing: {reason}.", "Raise --memory, or choose a smaller --to.",
    )  # fmt: skip


def neurons_not_considered(report: Report) -> Finding | None:
    """Report an elimination that memory kept from most of the experts' neurons."""
    limited = [r for r in layer_records(report) if r.get("pool") and r.get("neurons") and r["pool"] < r["neurons"]]
    if not limited:
        return None
    pool, neurons = limited[0]["pool"], limited[0]["neurons"]
    return finding(
        "neurons_not_considered", "warning", "Memory narrows the choice of neurons",
        f"In {len(limited)} layers the student's neurons were chosen from {pool:,} of the experts' {neurons:,}, those of most energy.",
        "Raise --memory.",
    )  # fmt: skip


BUILD_RULES = (
    few_calibration_tokens,
    fits_kept_nothing,
    layers_lost,
    heal_kept_nothing,
    heal_left_out,
    neurons_not_considered,
)
