"""`moe2dense list`: every teacher, student, method, loss, regime and format there is, read from the cards and registries."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal, Protocol

from rich.console import Console

from moe2dense.common.units import show_flops
from moe2dense.config.flags import argument
from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.errors import UserError
from moe2dense.families.cards import student_cards, teacher_cards
from moe2dense.families.machines import described_machine, machine_names
from moe2dense.losses.registry import DIVERGENCES, FEATURE_KINDS, LAYER_MAPS
from moe2dense.student.ffn.methods import METHODS, RECIPES
from moe2dense.student.init_spec import STEPS

What = Literal["all", "teachers", "students", "methods", "losses", "features", "regimes", "targets", "machines"]

# What stands above each list: what its names are for.
_ABOUT = {
    "teachers": "MoE families, and the names that stand for their public checkpoints",
    "students": "dense architectures (hosts) and named sizes for --to",
    "methods": "for --init: a method and the steps after it, METHOD[+refit][+local][+layer][+heal]",
    "losses": "for --loss",
    "features": "for train.features: KIND:LAYERS@WEIGHT, joined with +",
    "regimes": "for train.regime",
    "targets": "for train.target_format and `moe2dense targets --format`",
    "machines": "for `moe2dense plan --machine`, with a number before them: 1xh100",
}


class Row(Protocol):
    """A row of a registry: a dataclass with the name one types, a sentence of help, and perhaps a title and a paper."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """What one types."""
        ...


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Return everything `list` prints, as plain values."""
    return {
        "teachers": [
            {
                "family": card.model_type,
                "title": card.title,
                "host": card.host,
                "checkpoints": [{"id": row.id, "names": list(row.aliases)} for row in card.checkpoints],
                "notes": card.notes,
            }
            for card in teacher_cards().values()
        ],
        "students": [
            {
                "name": card.name,
                "kind": "target" if card.host else "host",
                "title": card.title,
                "moe_shaped": card.moe_shaped,
                "loads": card.loads,
            }
            for card in student_cards().values()
        ],
        "methods": _rows([*RECIPES.values(), *METHODS.values()], "method") + _rows(STEPS.values(), "step"),
        "losses": _rows(DIVERGENCES.values(), "loss"),
        "features": _rows(FEATURE_KINDS.values(), "kind") + _rows(LAYER_MAPS.values(), "layers"),
        "regimes": _rows(REGIMES.values(), "regime"),
        "targets": _rows(TARGET_FORMATS.values(), "format"),
        "machines": [_machine_row(name) for name in machine_names()],
    }


def _machine_row(name: str) -> dict[str, Any]:
    machine = described_machine(name)
    rates = f"{show_flops(machine.half)}/s in bfloat16, {show_flops(machine.single)}/s in float32"
    return {"name": name, "kind": "machine", "title": machine.title, "help": rates}


def _rows(rows: Iterable[Row], kind: str) -> list[dict[str, Any]]:
    """Rows of a registry as plain values."""
    return [
        {"name": row.name, "kind": kind} | {k: v for k, v in asdict(row).items() if k in ("title", "paper", "help")}
        for row in rows
    ]


def show_list(
    what: Annotated[What, argument("Which list.", example="teachers")] = "all",
    /,
    *,
    all: Annotated[
        bool, argument("Of teachers: every MoE architecture of the installed transformers, with what is known of it.")
    ] = False,
    json: Annotated[bool, argument("Print JSON instead of text.")] = False,
) -> None:
    """List the teachers, students, methods, losses, features, regimes, targets and machines there are, and what each is for.

    Raises UserError for --all with another list than teachers.
    """
    console = Console()
    if all:
        _show_all_types(what, json, console)
        return
    lists = catalogue()
    if what != "all":
        lists = {what: lists[what]}
    if json:
        console.print_json(data=lists)
        return
    for place, (name, rows) in enumerate(lists.items()):
        if place:
            console.print()
        console.print(f"[bold]{name}[/]", highlight=False)
        for line in _wrapped(_ABOUT[name], console.width, 0):
            console.print(line, highlight=False, markup=False, style="dim")
        for row in rows:
            _print_record(row, console)


def _show_all_types(what: What, json: bool, console: Console) -> None:
    """Print the status of every MoE architecture of the installed transformers. Raises UserError for another list."""
    if what != "teachers":
        raise UserError(f"--all belongs to `moe2dense list teachers`; found {what!r}")
    from moe2dense.cli.actions.list_types import all_types, summary

    rows = all_types()
    if json:
        console.print_json(data={"teachers": rows})
        return
    console.print(summary(rows), highlight=False)
    for row in rows:
        inside = f" (in {', '.join(row['wrappers'])})" if row["wrappers"] else ""
        known = f", dense host {row['host']}" if "host" in row else f": {row['reason']}" if "reason" in row else ""
        for line in _wrapped(f"{row['family']}{inside}  {row['status']}{known}", console.width, 2):
            console.print(line, highlight=False, markup=False)


def _print_record(row: dict[str, Any], console: Console) -> None:
    """Print one row as a block: its name, then what is known of it, indented and wrapped."""
    name = row.get("name") or row["family"]
    head = f"{name}  {row['title']}" if row.get("title", name) not in ("", name) else name
    kind = {"step": f"+{head}", "target": f"{head} (a size)"}.get(row.get("kind", ""), head)
    console.print()
    for line in _wrapped(kind, console.width, 2):
        console.print(line, highlight=False, markup=False, style="bold")
    for text in _details(row):
        for line in _wrapped(text, console.width, 6):
            console.print(line, highlight=False, markup=False)


def _details(row: dict[str, Any]) -> list[str]:
    """What stands below a row's name."""
    lines = [row["help"]] if row.get("help") else []
    if row.get("paper"):
        lines.append(row["paper"])
    if row.get("host"):
        lines.append(f"dense host: {row['host']}")
    lines += [f"{c['id']}: {', '.join(c['names'])}" if c["names"] else c["id"] for c in row.get("checkpoints", ())]
    if row.get("moe_shaped"):
        lines.append("keeps the form of an MoE, with one expert")
    loads = row.get("loads", {})
    if loading := [f"{stack} ({state})" for stack, state in loads.items() if not state.startswith("no")]:
        lines.append(f"loads in {', '.join(loading)}")
    lines += [f"not in {stack}{state[2:]}" for stack, state in loads.items() if state.startswith("no")]
    return lines


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    """A text as lines that fit the terminal, none of whose words is cut."""
    return textwrap.wrap(
        text,
        max(width - 1, 40),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2 if indent > 2 else indent + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )
