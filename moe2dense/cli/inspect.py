"""`moe2dense inspect`: a checkpoint's shape and routing, or a run's transfer report."""

from pathlib import Path

from moe2dense.student.open import is_run


def inspect(
    what: str,
    /,
    *,
    data: str | None = None,
    tokens: str = "16k",
    memory: str = "auto",
    block: int = 0,
    teacher_card: str = "",
    json: bool = False,
) -> None:
    """Show a checkpoint's shape and, with --data, its routing; or the transfer report of a run.

    Parameters
    ----------
    what: folder of a checkpoint, hub id, known name, or folder of a run
    data: text to route, for the load of every expert
    tokens: how much of it
    memory: budget for weights and hidden states
    block: tokens per block; default min(2048, the teacher's max positions)
    teacher_card: TOML card of a family that is not shipped
    json: print JSON instead of tables
    """
    from rich.console import Console

    console = Console()
    if is_run(Path(what)):
        from moe2dense.reporting.report_file import read_report
        from moe2dense.reporting.terminal import print_report

        report = read_report(what)
        console.print_json(data=report) if json else print_report(report, console)
        return
    from moe2dense.families.resolve import resolve_teacher
    from moe2dense.modeling.shape import teacher_geometry

    found = resolve_teacher(what, teacher_card)
    shape = teacher_geometry(found.config, found.card)
    routing = _routing(what, data, tokens, memory, block, teacher_card) if data else None
    if json:
        import dataclasses

        console.print_json(data={"shape": dataclasses.asdict(shape), "routing": routing})
        return
    _print_shape(shape, found, console)
    if routing is None:
        console.print("pass --data to see how the experts are used")
    else:
        _print_routing(routing, console)


def _routing(what: str, data: str, tokens: str, memory: str, block: int, teacher_card: str) -> dict:
    from moe2dense.cli.common import open_teacher, read_text
    from moe2dense.common.units import parse_count
    from moe2dense.teacher.routing_report import routing_report

    teacher = open_teacher(what, memory=memory, card=teacher_card)
    return routing_report(teacher, read_text(data, teacher, block, "valid", parse_count(tokens, "--tokens")))


def _print_shape(shape, found, console) -> None:
    from rich.table import Table

    from moe2dense.common.units import show_count

    table = Table(title=f"{found.name} ({found.card.title})", title_justify="left", show_header=False)
    sparse = len(shape.moe_layers)
    rows = [
        ("parameters", f"{show_count(shape.parameters)}, {show_count(shape.active_parameters)} for a token"),
        ("layers", f"{shape.num_hidden_layers}, {sparse} of them sparse"),
        ("hidden_size", str(shape.hidden_size)),
        ("experts", f"{shape.num_experts} of width {shape.expert_width}, top-{shape.top_k}"),
        ("shared", f"width {shape.shared_width}" if shape.shared_width else "none"),
        ("vocabulary", str(shape.vocab_size)),
        ("positions", str(shape.max_positions)),
        ("dense host", found.card.host),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_routing(routing: dict, console) -> None:
    from rich.table import Table

    table = Table(title=f"routing over {routing['tokens']} tokens", title_justify="left", header_style="bold")
    for column in ("layer", "effective experts", "Gini", "dead", "busiest", "share of the tokens"):
        table.add_column(column)
    for row in routing["layers"]:
        if not row["sparse"]:
            table.add_row(str(row["layer"]), "dense", *[""] * 4)
            continue
        load = row["load"]
        shown = " ".join(f"{x:.0%}" for x in load) if len(load) <= 16 else f"{min(load):.1%} to {max(load):.1%}"
        busiest = max(range(len(load)), key=load.__getitem__)
        table.add_row(
            str(row["layer"]),
            f"{row['effective_experts']:.1f}",
            f"{row['gini']:.2f}",
            str(len(row["dead"])),
            str(busiest),
            shown,
        )
    console.print(table)
    console.print(routing["prediction"], highlight=False)
