"""Write the model card of an exported student: where it comes from, how close it is, what was lost, how to load it."""

import html
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from moe2dense.common.files import atomic_write
from moe2dense.common.units import show_count
from moe2dense.common.versions import EXPORT_PACKAGES, versions
from moe2dense.errors import UserError

# Every field is optional; a card says nothing where nothing is known.
INFO_FIELDS = {
    "name": "title of the card; default: the folder's name",
    "teacher": "hub id or path of the teacher",
    "license": "SPDX id of the teacher's license, passed on; default: what the teacher's own card says",
    "license_name": "name of a license that is not on the hub's list (then license = 'other')",
    "license_link": "where that license is",
    "datasets": "hub ids or names of the texts used",
    "languages": "language codes",
    "tags": "more tags",
    "target": "--to as given",
    "method": "how the student's FFNs were built, e.g. layerwise",
    "tokens": "unique teacher positions seen, the build's included",
    "written_tokens": "of these, how many the teacher wrote on top of the text",
    "replayed": "positions seen in training, repeats included",
    "seed": "seed of the run",
    "rows": "list of {'name': str, 'scores': Scores.to_dict()}, the student first",
    "tokens_judged": "held-out tokens behind the table",
    "transferred": "mean coverage of the experts by the student's neurons, 0 to 1",
    "lost": "sentences: what the student does worse, worst experts, domains",
    "command": "the exact command",
    "config": "the resolved settings as TOML",
    "versions": "package -> version; default: those in use",
}
_COLUMNS = (
    ("kl", "KL from the teacher, nats/token"),
    ("nll", "NLL, nats/token"),
    ("agreement", "same first choice"),
    ("rare_kl", "KL on rare tokens"),
)
_LOADING = "## How to load it"
_STATUS = {"seen": "yes, this architecture is tested there", "documented": "by its documentation, not tested"}
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def check_info(info: dict[str, Any] | None) -> dict[str, Any]:
    """Return a copy of `info` without empty fields. Raises UserError for a field that a card does not have."""
    for key in info or {}:
        if key not in INFO_FIELDS:
            raise UserError(f"info: unknown field {key!r}; a card has {', '.join(INFO_FIELDS)}")
    return {key: value for key, value in (info or {}).items() if value not in (None, "", [], {})}


def is_hub_id(name: Any) -> bool:
    """Return whether `name` looks like an id on the hub, and not like a folder here."""
    return isinstance(name, str) and bool(_HUB_ID.match(name)) and not Path(name).exists()


def metadata(info: dict[str, Any], moe_shaped: bool, quantize: str = "", library: str = "transformers") -> str:
    """Return the YAML block that the hub reads."""
    tags = ["moe2dense", "distillation", "mixture-of-experts-teacher", "moe-shaped" if moe_shaped else "dense"]
    tags += [quantize] * bool(quantize) + [tag for tag in info.get("tags", []) if tag not in tags]
    teacher = info.get("teacher")
    data = ModelCardData(
        base_model=teacher if is_hub_id(teacher) else None,
        license=info.get("license"),
        license_name=info.get("license_name"),
        license_link=info.get("license_link"),
        library_name=library,
        datasets=[d for d in info.get("datasets", []) if is_hub_id(d)] or None,
        language=info.get("languages"),
        pipeline_tag="text-generation",
        tags=tags,
    )
    return data.to_yaml()


def escaped(text: Any) -> str:
    """Return a name or sentence as plain text within Markdown: no HTML, no cell or line breaks, no code spans."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return plain.replace("|", "\\|").replace("`", "\\`").replace("[", "\\[")


def code(text: Any) -> str:
    """Return a name as a code span, in which nothing is markup."""
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"


def fenced(text: str, language: str) -> list[str]:
    """Return lines of a code block, fenced by more backticks than the text has in a row."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]


def show_estimate(value: Any) -> str:
    """Show a number, or {'value', 'low', 'high'}, as '0.106 [0.099, 0.114]'; a dash where there is none."""
    if isinstance(value, dict):
        middle, low, high = (value.get(k) for k in ("value", "low", "high"))
        if middle is None:
            return "–"
        return f"{middle:.3g}" if low is None or high is None else f"{middle:.3g} [{low:.3g}, {high:.3g}]"
    if value is None or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    low, high = getattr(value, "low", None), getattr(value, "high", None)
    return f"{value:.3g}" if low is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def score_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: one line per model, the teacher first."""
    shown = [(key, title) for key, title in _COLUMNS if any(row["scores"].get(key) is not None for row in rows)]
    lines = [
        "| model | " + " | ".join(title for _, title in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    teacher = {"kl": 0.0, "nll": rows[0]["scores"].get("teacher_nll"), "agreement": 1.0, "rare_kl": 0.0}
    for name, scores in [("teacher", teacher), *((row["name"], row["scores"]) for row in rows)]:
        lines.append(f"| {escaped(name)} | " + " | ".join(show_estimate(scores.get(key)) for key, _ in shown) + " |")
    return "\n".join(lines)


def _provenance(info: dict[str, Any]) -> str:
    teacher = info.get("teacher")
    shown = f"[{teacher}](https://huggingface.co/{teacher})" if is_hub_id(teacher) else code(teacher)
    shown = shown if teacher else "a Mixture-of-Experts teacher"
    parts = [f"A dense student of {shown}, made with moe2dense"]
    if info.get("target"):
        parts.append(f"(target {code(info['target'])})")
    text = " ".join(parts) + ": its feed-forward layers were built from the teacher's experts"
    if info.get("method"):
        text += f" by {code(info['method'])}"
    if info.get("tokens"):
        written = info.get("written_tokens") or 0
        text += f", and it learnt to predict the teacher's distribution on {info['tokens'] - written:,} tokens"
        if info.get("datasets"):
            text += " of " + ", ".join(code(d) for d in info["datasets"])
        if written:
            text += f" and {written:,} that the teacher wrote on top"
    text += "." + (f" Seed {info['seed']}." if "seed" in info else "")
    return text + " It inherits the teacher's tokenizer, license and limits."


def _quality(info: dict[str, Any], quantized: dict[str, float] | None) -> list[str]:
    lines = []
    if info.get("rows"):
        judged = f" on {info['tokens_judged']:,} held-out tokens" if info.get("tokens_judged") else " on held-out text"
        lines += [f"Measured{judged}, with 95% intervals:", "", score_table(info["rows"]), ""]
    else:
        lines += ["Not measured.", ""]
    if quantized:
        lines += [
            f"Quantisation moved the student by {quantized['kl']:.4f} nats per token (KL from the unquantised student, "
            f"{quantized['tokens']:,} tokens)."
            + " Rows that do not say otherwise are unquantised."
            * bool(info.get("rows")),
            "",
        ]
    return lines


def _lost(info: dict[str, Any]) -> list[str]:
    lines = ["For the uses the teacher was meant for, where its size is too much; judge it on your own text first.", ""]
    if "transferred" in info:
        lines += [f"The student's neurons cover {100 * info['transferred']:.0f}% of what single experts compute.", ""]
    lines += [f"- {escaped(sentence)}" for sentence in info.get("lost", [])] + [""] * bool(info.get("lost"))
    if not info.get("lost"):
        lines += ["A dense student of fewer parameters knows less than its teacher: expect rare facts to go first.", ""]
    return lines


def _loading(name: str, loads: dict[str, str], quantize: str, format: str) -> list[str]:
    if format == "gguf":
        return ["```shell", f"llama-server -m {name}/model-*.gguf", "```", ""]
    lines = [
        "```python",
        "from transformers import pipeline",
        f'print(pipeline("text-generation", model="{name}")("Once upon a time", max_new_tokens=40))',
        "```",
        "",
        "```shell",
        f"vllm serve {name}",
        "```",
        "",
    ]
    if not quantize:
        lines += [
            "```shell",
            f"moe2dense export {name} --format gguf --quantize q8_0 --out {name}-gguf",
            f"llama-server -m {name}-gguf/model-q8_0.gguf",
            "```",
            "",
        ]
    if loads:
        lines += [
            "| stack | loads there? |",
            "|---|---|",
            *(f"| {stack} | {_STATUS.get(status, status)} |" for stack, status in loads.items()),
            "",
        ]
    return lines


def add_sentence(folder: Path, sentence: str) -> None:
    """Add to the card of an export what was seen when it was loaded elsewhere. An earlier sentence stays."""
    card = folder / "README.md"
    heading = f"{_LOADING}\n\n"
    text = card.read_text(encoding="utf-8")
    atomic_write(card, text.replace(heading, f"{heading}{escaped(sentence)}\n\n", 1))


def model_card(
    name: str,
    info: dict[str, Any],
    *,
    dtype: str,
    parameters: int,
    loads: dict[str, str] | None = None,
    moe_shaped: bool = False,
    quantize: str = "",
    quantized: dict[str, float] | None = None,
    format: str = "hf",
    notes: str = "",
) -> str:
    """Return the README.md of an exported checkpoint.

    info: see INFO_FIELDS. quantized: KL and tokens of a quantised export. notes: what the host's card says of loading it.
    """
    title = info.get("name", name)
    stored = f"{quantize} weights" if quantize else f"{dtype}"
    lines = [
        "---",
        metadata(info, moe_shaped, quantize, "gguf" if format == "gguf" else "transformers"),
        "---",
        "",
        f"# {escaped(title)}",
        "",
        _provenance(info),
        "",
    ]
    lines += [f"{show_count(parameters)} parameters, {stored}.", ""]
    lines += ["## How close it is to the teacher", "", *_quality(info, quantized)]
    lines += ["## Use, and what was lost", "", *_lost(info)]
    lines += [_LOADING, "", *_loading(name, loads or {}, quantize, format)]
    lines += [notes, ""] * bool(notes)
    lines += ["## How it was made", ""]
    if info.get("command"):
        lines += [*fenced(info["command"], "shell"), ""]
    if info.get("config"):
        lines += [
            "<details><summary>settings</summary>",
            "",
            *fenced(info["config"].strip(), "toml"),
            "",
            "</details>",
            "",
        ]
    shown = info.get("versions") or versions(EXPORT_PACKAGES)
    lines += ["Versions: " + ", ".join(f"{package} {version}" for package, version in shown.items()) + "."]
    return "\n".join(lines) + "\n"
