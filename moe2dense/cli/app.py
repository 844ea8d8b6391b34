"""The command line. Each command is a Python function: its parameters are the flags, described where the options are."""

from cyclopts import App
from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, HelpEntry, NameRenderer
from rich.console import Console, ConsoleOptions

from moe2dense.common.versions import __version__

# Widths of the two columns of a help page, borders left out, for a terminal of 80 columns.
_NAME_WIDTH = 24

# (command, module:function, one line for --help); a command's module is loaded when that command is asked for
COMMANDS = (
    (
        "convert",
        "moe2dense.conversion.api:convert",
        "Turn an MoE into a dense checkpoint, with a report of what survived.",
    ),
    ("plan", "moe2dense.conversion.api:plan", "Show what a conversion would build and cost, without reading weights."),
    ("list", "moe2dense.cli.list:show_list", "List teachers, students, methods, losses, regimes and features."),
    ("inspect", "moe2dense.cli.inspect:inspect", "Show a checkpoint's shape and routing, or a run's report."),
    ("targets", "moe2dense.cli.targets:targets", "Store the teacher's targets on a text."),
    (
        "distill",
        "moe2dense.cli.distill:distill_checkpoint",
        "Train a dense checkpoint on a teacher or its stored targets.",
    ),
    ("generate", "moe2dense.cli.generate:generate_text", "Let a teacher write text to train on."),
    ("eval", "moe2dense.cli.evaluate:evaluate_checkpoint", "Compare a dense checkpoint with its teacher."),
    ("report", "moe2dense.reporting.show:report", "Write a run's report again, or compare two runs."),
    ("export", "moe2dense.cli.export:export_checkpoint", "Write a student for transformers, vLLM or llama.cpp."),
    ("serve", "moe2dense.cli.serve:serve", "Start the installed stack that serves a student."),
    ("chat", "moe2dense.cli.chat:chat", "Talk with a student, side by side with its teacher."),
    ("doctor", "moe2dense.cli.doctor:doctor", "Show versions, devices, and which optional parts are on."),
)

# What `moe2dense COMMAND` without any argument says.
FIRST_WORDS = {
    "convert": """\
moe2dense convert turns a Mixture-of-Experts model into a dense one. It needs a
teacher and the size of the student. To begin with:

  moe2dense convert examples/tiny-mixtral --to 3.2m --tokens 60k --out out/first
      converts the small model of a checkout, in a few minutes on two cores

  moe2dense plan mixtral --to 7b
      says what a large conversion would build and cost, before you start it

`moe2dense convert --help` explains every flag, `moe2dense list` the names.
""",
    "plan": """\
moe2dense plan says what a conversion would build and cost, without reading any
weights. It needs a teacher and the size of the student. To begin with:

  moe2dense plan mixtral --to 7b
      a well-known model; `moe2dense list teachers` has more

  moe2dense plan FOLDER --to 25% --memory 8GB
      a checkpoint of your own, down to a quarter of its parameters

`moe2dense plan --help` explains every flag.
""",
}


def _columns(console: Console, options: ConsoleOptions, entries: list[HelpEntry]) -> tuple[ColumnSpec, ...]:
    """Names of one width on every panel, so that the descriptions of a page stand in one line."""
    name = ColumnSpec(
        renderer=NameRenderer(max_width=_NAME_WIDTH),
        style="cyclopts.name",
        min_width=_NAME_WIDTH,
        max_width=_NAME_WIDTH,
    )
    return name, ColumnSpec(renderer=DescriptionRenderer(), overflow="fold")


app = App(
    name="moe2dense",
    help="Turn a sparse Mixture-of-Experts language model into a dense one that behaves like it.\n\n"
    "`moe2dense convert` without arguments says what to type first.",
    version=__version__,
    help_format="plaintext",
    help_formatter=DefaultFormatter(column_specs=_columns),
    suppress_keyboard_interrupt=False,  # a stopped conversion says how to resume
)
for _place, (_name, _where, _help) in enumerate(COMMANDS):
    app.command(_where, name=_name, help=_help, sort_key=_place)
