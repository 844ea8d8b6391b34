"""`moe2dense targets`: the teacher's distributions on a text, stored for training without the teacher, and looked at."""

from pathlib import Path
from typing import Any, Literal


def targets(
    teacher: str,
    /,
    *,
    data: str,
    out: Path | None = None,
    format: Literal["hidden", "sampled", "topk", "full"] = "hidden",
    tokens: str = "500k",
    temperature: float = 1.0,
    k: int = 32,
    draws: int = 50,
    features: str = "",
    token_weights: str = "",
    analyze: bool = False,
    json: bool = False,
    block: int = 0,
    seed: int = 0,
    memory: str = "auto",
    experts: str = "auto",
    device: str = "auto",
    teacher_card: str = "",
) -> None:
    """Stream the teacher once and store its targets for `moe2dense distill --targets`.

    Under torchrun every process writes its share of the store.

    Parameters
    ----------
    teacher: folder of a checkpoint, hub id, or known name
    data: text: folder with train/valid/test files, one file, or a hub id
    out: folder of the store; an unfinished one is continued
    format: hidden and full serve every loss; sampled forward KL; topk forward KL and hard labels
    tokens: how many teacher positions
    temperature: of sampled and topk, which serve that one only
    k: how many of the likeliest tokens topk keeps
    draws: how many tokens sampled draws at each position
    features: hidden states, attention and the like of some layers too, written as for training (mse:uniform+attention:last); for a student as deep as the teacher
    token_weights: keep how the teacher routed each token: router-entropy, expert-saliency, or both with a comma
    analyze: print what the teacher's soft labels on this text say beyond the text; needs no --out
    json: with --analyze, print JSON instead of tables
    block: tokens per block; default min(2048, the teacher's max positions)
    seed: order of the text, and of what is drawn
    memory: budget for teacher weights and hidden states
    experts: how experts are computed: auto, streamed, grouped_mm, megablocks
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    """
    from rich.console import Console

    from moe2dense.cli.common import open_teacher, read_text
    from moe2dense.common.progress import progress_for
    from moe2dense.common.units import parse_count
    from moe2dense.distillation.targets.store import write_targets
    from moe2dense.losses.feature_spec import teacher_features

    _check(out, format, temperature, analyze)
    count = parse_count(tokens, "--tokens")
    console = Console(stderr=json)
    model = open_teacher(teacher, memory=memory, experts=experts, device=device, card=teacher_card)
    layers = model.config.get_text_config().num_hidden_layers
    names = teacher_features(features, layers, layers)
    blocks = read_text(data, model, block, "train", count, seed)
    with progress_for(console) as progress:
        if out is not None:
            write_targets(
                model, blocks, out, format=format, temperature=temperature, k=k, draws=draws, seed=seed,
                features=names, routing=[n.strip() for n in token_weights.split(",") if n.strip()], progress=progress,
            )  # fmt: skip
            _tell(out, format, console)
        found = _analysis(model, blocks, out, progress) if analyze else None
    if found is not None:
        _print_analysis(found, Console(), json)


def _check(out: Path | None, format: str, temperature: float, analyze: bool) -> None:
    from moe2dense.common.processes import launched
    from moe2dense.errors import UserError

    if out is None and not analyze:
        raise UserError("--out is missing: the folder of the store (or --analyze, which needs none)")
    if temperature != 1 and format in ("hidden", "full"):
        raise UserError(
            f"--temperature {temperature:g} is for sampled and topk; {format} targets serve any, chosen when distilling"
        )
    if analyze and format not in ("hidden", "full"):
        raise UserError(f"--analyze needs the whole distribution; use --format hidden or full, not {format}")
    if analyze and launched()[1] > 1:
        raise UserError("--analyze runs in one process; write the store first, then run it again without torchrun")


def _tell(out: Path, format: str, console: Any) -> None:
    """What lies in the store now."""
    import json

    from moe2dense.common.units import show_bytes

    about = json.loads((out / "store.json").read_text())
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    stored = sum(s["to"] - s["from"] for s in about["shards"])
    if stored < about["blocks"]:
        console.print(f"{out}: {stored} of {about['blocks']} blocks are written; other processes are at it")
        return
    positions = stored * about["block"]
    console.print(
        f"{out}: {format} targets of {positions} tokens, {show_bytes(size)} ({size / positions:.0f} bytes a token)"
    )


def _analysis(model: Any, blocks: Any, out: Path | None, progress: Any) -> dict[str, Any]:
    from moe2dense.distillation.targets.analyze import analyze_targets
    from moe2dense.distillation.targets.memory import hidden_targets
    from moe2dense.distillation.targets.store import open_targets

    found = hidden_targets(model, blocks) if out is None else open_targets(out, blocks)
    return analyze_targets(found, blocks, model.tokenizer().decode, progress)


_COLUMNS = {
    "tokens": "tokens", "entropy": "entropy", "nll": "NLL", "information": "information", "top1_mass": "top-1",
    "top5_mass": "top-5", "top12_mass": "top-12", "top32_mass": "top-32", "dark": "off top-1",
    "top1_is_label": "top-1 right",
}  # fmt: skip


def _print_analysis(found: dict[str, Any], console: Any, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        console.print_json(data=found)
        return
    groups = {"all": found["all"]} | dict(sorted(found["domains"].items()))
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
    for row in found["examples"]:
        expected = ", ".join(f"{text!r} {share:.2f}" for text, share in row["expected"])
        console.print(
            f"  ...{row['context']!r} -> {row['label']!r}; expected {expected}", highlight=False, markup=False
        )
