"""Store a teacher's targets, and look at them, as `moe2dense targets` asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe2dense.cli.actions.common import open_teacher, read_text
from moe2dense.common.object_store import is_url
from moe2dense.common.processes import launched
from moe2dense.common.progress import Report, progress_for
from moe2dense.common.units import parse_count, show_bytes
from moe2dense.config.schema import RunConfig
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.analyze import analyze_targets
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.places import place_of
from moe2dense.distillation.targets.store import HEAD, KEYS, open_targets, read_manifest, stored_blocks
from moe2dense.distillation.targets.write import write_targets
from moe2dense.errors import UserError
from moe2dense.losses.feature_spec import teacher_features
from moe2dense.modeling.attention import attention_setting
from moe2dense.teacher.model import Teacher

_WHOLE = ("hidden", "full")  # formats that hold the whole distribution

# number of an analysis -> its row
_COLUMNS = {
    "tokens": "tokens",
    "entropy": "entropy",
    "nll": "NLL",
    "information": "information",
    "top1_mass": "top-1",
    "top5_mass": "top-5",
    "top12_mass": "top-12",
    "top32_mass": "top-32",
    "dark": "off top-1",
    "top1_is_label": "top-1 right",
}


@dataclass(frozen=True)
class TargetsRequest:
    """Which targets of which teacher on which text are stored, and where."""

    teacher: str
    data: str
    out: str | Path | None
    tokens: str
    settings: RunConfig
    format: str = "hidden"
    k: int = 32
    draws: int = 50
    temperature: float = 1.0
    features: str = ""
    token_weights: tuple[str, ...] = ()


def run_targets(request: TargetsRequest, analyze: bool = False, as_json: bool = False) -> None:
    """Write the store, and print what it holds or says. Raises UserError for bad input."""
    _check(request, analyze)
    if request.out is not None and is_url(request.out):
        place_of(request.out).begin()  # before the teacher is read
    with attention_setting(request.settings.attention):
        _store(request, analyze, as_json)


def _store(request: TargetsRequest, analyze: bool, as_json: bool) -> None:
    """Write the store, and print what it holds or says, once the request is known to make sense."""
    count, options, seed = parse_count(request.tokens, "--tokens"), request.settings.teacher, request.settings.seed
    console = Console(stderr=as_json)
    teacher = open_teacher(request.teacher, options)
    layers = teacher.config.get_text_config().num_hidden_layers
    features = teacher_features(request.features, layers, layers)
    blocks = read_text(request.data, teacher, request.settings.data, "train", count, seed)
    analysis = None
    with progress_for(console) as progress:
        if request.out is not None:
            write_targets(
                teacher,
                blocks,
                request.out,
                format=request.format,
                temperature=request.temperature,
                k=request.k,
                draws=request.draws,
                seed=seed,
                features=features,
                routing=list(request.token_weights),
                progress=progress,
            )
            print_store(request.out, request.format, console)
        if analyze:
            analysis = _analysis(teacher, blocks, request.out, progress)
    if analysis is not None:
        _print_analysis(analysis, Console(), as_json)


def _check(request: TargetsRequest, analyze: bool) -> None:
    """Refuse flags that do not fit together. Raises UserError."""
    if request.out is None and not analyze:
        raise UserError("--out is missing: the folder of the store (or --analyze, which needs none)")
    if request.temperature != 1 and request.format in _WHOLE:
        raise UserError(
            f"--temperature {request.temperature:g} is for sampled and topk; {request.format} targets serve any, chosen when distilling"
        )
    if analyze and request.format not in _WHOLE:
        raise UserError(f"--analyze needs the whole distribution; use --format hidden or full, not {request.format}")
    if analyze and launched()[1] > 1:
        raise UserError("--analyze runs in one process; write the store first, then run it again without torchrun")


def print_store(out: str | Path, format: str, console: Console) -> None:
    """Print what lies in the store now."""
    place, manifest = place_of(out), read_manifest(out)
    size = place.stored_bytes([KEYS, *([HEAD] if place.has(HEAD) else []), *(s["file"] for s in manifest["shards"])])
    stored = stored_blocks(manifest)
    if stored < manifest["blocks"]:
        console.print(f"{out}: {stored} of {manifest['blocks']} blocks are written; other processes are at it")
        return
    positions = stored * manifest["block"]
    console.print(
        f"{out}: {format} targets of {positions} tokens, {show_bytes(size)} ({size / positions:.0f} bytes a token)"
    )


def _analysis(teacher: Teacher, blocks: Blocks, out: str | Path | None, progress: Report) -> dict[str, Any]:
    targets = hidden_targets(teacher, blocks) if out is None else open_targets(out, blocks)
    tokenizer = teacher.tokenizer()
    return analyze_targets(targets, blocks, lambda ids: str(tokenizer.decode(ids)), progress)


def _print_analysis(analysis: dict[str, Any], console: Console, as_json: bool) -> None:
    if as_json:
        console.print_json(data=analysis)
        return
    groups = {"all": analysis["all"]} | dict(sorted(analysis["domains"].items()))
    table = Table("", *groups, title="The teacher's soft labels (nats, shares of the mass)")
    for name, title in _COLUMNS.items():
        show = "{:.0f}" if name == "tokens" else "{:.3f}"
        table.add_row(title, *(show.format(g[name]) for g in groups.values()))
    console.print(table)
    console.print(
        "information: NLL less entropy, what the text says beyond what the teacher expects; near 0 when it is calibrated\n"
        "Where the teacher is least sure:",
        highlight=False,
    )
    for row in analysis["examples"]:
        expected = ", ".join(f"{text!r} {share:.2f}" for text, share in row["expected"])
        console.print(
            f"  ...{row['context']!r} -> {row['label']!r}; expected {expected}", highlight=False, markup=False
        )
