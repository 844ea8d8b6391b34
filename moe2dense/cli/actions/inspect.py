"""Show a checkpoint's shape and routing, or a run's report, as `moe2dense inspect` asks."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from moe2dense.cli.actions.common import open_teacher, read_text
from moe2dense.common.units import parse_count, show_count
from moe2dense.config.schema import RunConfig
from moe2dense.conversion.configure import CONFIG
from moe2dense.conversion.teacher_folder import checked_teacher
from moe2dense.data.blocks import Blocks
from moe2dense.errors import UserError
from moe2dense.families.resolve import ResolvedTeacher
from moe2dense.modeling.shape import Geometry, teacher_geometry
from moe2dense.reporting.report_file import read_report, report_errors
from moe2dense.reporting.terminal import print_report
from moe2dense.student.locate import is_run
from moe2dense.teacher.routing_report import routing_report

_SAMPLE_TOKENS = 256  # of a block that is shown
_MOST_SHARES = 16  # experts whose shares of the tokens are shown one by one


def is_run_folder(what: str) -> bool:
    """Return whether a folder is that of a conversion, finished or not; a checkpoint may have a moe2dense.toml too."""
    folder = Path(what)
    return is_run(folder) or ((folder / CONFIG).is_file() and not (folder / "config.json").is_file())


def inspect_run(what: str, as_json: bool = False) -> None:
    """Print the report of a run. Raises UserError for one that has not finished."""
    if not (Path(what) / "report.json").is_file():
        raise UserError(
            f"{what} is an unfinished run: it has no report yet; finish it with `moe2dense convert --out {what} --resume`"
        )
    report, console = read_report(what), Console()
    if as_json:
        console.print_json(data=report)
    else:
        with report_errors(what):
            print_report(report, console)


def inspect_checkpoint(what: str, data: str | None, tokens: str, settings: RunConfig, as_json: bool = False) -> None:
    """Print the shape of a teacher and, on the text `data`, how its experts are used. Raises UserError."""
    console, options = Console(), settings.teacher
    resolved, remarks = checked_teacher(what, options.card)
    shape = teacher_geometry(resolved.config, resolved.card)
    routing = sample = None
    if data:
        teacher = open_teacher(what, options)
        count = parse_count(tokens, "--tokens")
        blocks = read_text(data, teacher, settings.data, "valid", count)
        routing, sample = routing_report(teacher, blocks), learnt_pieces(blocks, teacher.tokenizer())
    if as_json:
        console.print_json(
            data={"shape": dataclasses.asdict(shape), "routing": routing, "remarks": remarks, "sample": sample}
        )
        return
    console.print(_shape_table(shape, resolved))
    for remark in remarks:
        console.print(f"[yellow]warning:[/] {escape(remark)}", highlight=False)
    if routing is None:
        console.print("pass --data to see how the experts are used")
    else:
        print_routing(routing, console)
    if sample:
        print_sample(sample, console)


def _shape_table(shape: Geometry, resolved: ResolvedTeacher) -> Table:
    table = Table(title=f"{resolved.name} ({resolved.card.title})", title_justify="left", show_header=False)
    sparse = len(shape.moe_layers)
    rows = [
        ("parameters", f"{show_count(shape.parameters)}, {show_count(shape.active_parameters)} for a token"),
        ("layers", f"{shape.num_hidden_layers}, {sparse} of them sparse"),
        ("hidden_size", str(shape.hidden_size)),
        ("experts", f"{shape.num_experts} of width {shape.expert_width}, top-{shape.top_k}"),
        ("shared", f"width {shape.shared_width}" if shape.shared_width else "none"),
        ("vocabulary", str(shape.vocab_size)),
        ("positions", str(shape.max_positions)),
        ("dense host", resolved.card.host),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def print_routing(routing: dict[str, Any], console: Console) -> None:
    """Print how evenly each layer's experts are used, and what that foretells for a dense student."""
    table = Table(title=f"routing over {routing['tokens']} tokens", title_justify="left", header_style="bold")
    for column in ("layer", "effective experts", "Gini", "dead", "busiest", "share of the tokens"):
        table.add_column(column)
    for row in routing["layers"]:
        if not row["sparse"]:
            table.add_row(str(row["layer"]), "dense", *[""] * 4)
            continue
        load = row["load"]
        one_by_one = " ".join(f"{x:.0%}" for x in load)
        table.add_row(
            str(row["layer"]),
            f"{row['effective_experts']:.1f}",
            f"{row['gini']:.2f}",
            str(len(row["dead"])),
            str(max(range(len(load)), key=load.__getitem__)),
            one_by_one if len(load) <= _MOST_SHARES else f"{min(load):.1%} to {max(load):.1%}",
        )
    console.print(table)
    console.print(routing["prediction"], highlight=False)


def learnt_pieces(blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the beginning of the first block as (text, whether it is learnt), neighbours of a kind together."""
    ids = blocks.input_ids[0, :_SAMPLE_TOKENS]
    learnt = torch.ones_like(ids, dtype=torch.bool)
    if blocks.labels_mask is not None:
        learnt &= blocks.labels_mask[0, :_SAMPLE_TOKENS]
    if blocks.prefix_mask is not None:
        learnt &= ~blocks.prefix_mask[0, :_SAMPLE_TOKENS]
    pieces: list[tuple[str, bool]] = []
    for kind, group in itertools.groupby(zip(ids.tolist(), learnt.tolist(), strict=True), key=lambda pair: pair[1]):
        pieces.append((str(tokenizer.decode([i for i, _ in group])), kind))
    return pieces


def print_sample(pieces: list[tuple[str, bool]], console: Console) -> None:
    """Print rendered text with the learnt words in colour, and in brackets where there is no colour."""
    console.print("\nhow a block of the text begins; what is learnt is marked:", highlight=False)
    text = Text()
    for piece, learnt in pieces:
        shown = f"⟦{piece}⟧" if learnt and not console.is_terminal else piece
        text.append(shown, style="black on green" if learnt else "dim")
    console.print(text)
