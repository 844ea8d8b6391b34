"""`moe2dense eval`: a dense checkpoint against its teacher on held-out text."""

from typing import Any, Literal


def evaluate_checkpoint(
    student: str,
    /,
    *,
    teacher: str,
    data: str,
    split: Literal["valid", "test", "ood", "train", "all"] = "valid",
    tokens: str = "25k",
    block: int = 0,
    baseline: list[str] | None = None,
    seed: int = 0,
    memory: str = "auto",
    device: str = "auto",
    teacher_card: str = "",
    json: bool = False,
) -> None:
    """Compare a student with its teacher: KL, NLL, agreement, rare tokens, domains, with 95% intervals.

    Parameters
    ----------
    student: folder of a dense checkpoint or of a run
    teacher: folder of a checkpoint, hub id, or known name
    data: held-out text: folder, file, or hub id
    split: which of the folder's files; `all` takes a file as it stands
    tokens: how much of it
    block: tokens per block; default min(2048, the teacher's max positions)
    baseline: more dense checkpoints with the same tokenizer, a row each
    seed: of the bootstrap and the order of the text
    memory: budget for teacher weights and hidden states
    device: auto, cpu or cuda
    teacher_card: TOML card of a family that is not shipped
    json: print JSON instead of a table
    """
    from rich.console import Console

    from moe2dense.evaluation import evaluate, reference
    from moe2dense.units import parse_count
    from moe2dense.verbs.common import open_student, open_teacher, read_text

    console = Console()
    model = open_teacher(teacher, memory=memory, device=device, card=teacher_card)
    blocks = read_text(data, model, block, split, parse_count(tokens, "--tokens"), seed)
    truth = reference(model, blocks)
    rows = {"teacher": evaluate(truth, truth, seed=seed)}
    for name in (student, *(baseline or [])):
        rows[name] = evaluate(open_student(name), truth, seed=seed)
    if json:
        console.print_json(data={name: scores.to_dict() for name, scores in rows.items()})
        return
    console.print(score_table(rows, f"{blocks.tokens} tokens of {data} ({split})"))
    domains = sorted(rows[student].by_domain)
    if domains != [""]:
        console.print("KL by domain: " + "  ".join(f"{d} {rows[student].by_domain[d]['kl']:.3f}" for d in domains))


def score_table(rows: dict[str, Any], title: str) -> Any:
    """Scores by row name as a rich table: value and 95% interval."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True, max_width=22)
    for column in ("KL", "NLL", "same choice", "rare KL"):
        table.add_column(column, no_wrap=True, min_width=12)
    for name, scores in rows.items():
        cells = [_cell(getattr(scores, k)) for k in ("kl", "nll", "agreement", "rare_kl")]
        table.add_row(name if len(name) <= 22 else f"…{name[-21:]}", *cells)
    return table


def _cell(estimate: Any) -> str:
    """Value and half the width of its 95% interval."""
    value, half = float(estimate), (estimate.high - estimate.low) / 2
    return f"{value:.1f} ±{half:.1f}" if value >= 10 else f"{value:.3f} ±{half:.3f}"
