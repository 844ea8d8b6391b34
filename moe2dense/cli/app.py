"""The command line. Each command is a Python function: its parameters are the flags, its docstring the help."""

from cyclopts import App

from moe2dense.common.versions import __version__

app = App(
    name="moe2dense",
    help="Turn a sparse Mixture-of-Experts language model into a dense one that behaves like it.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # a stopped conversion says how to resume
)

# (command, module:function, one line for --help); a command's module is loaded when that command is asked for
COMMANDS = (
    (
        "convert",
        "moe2dense.conversion.api:convert",
        "Turn an MoE into a dense checkpoint, with a report of what survived.",
    ),
    ("plan", "moe2dense.conversion.api:plan", "Show what a conversion would build and cost, without reading weights."),
    ("list", "moe2dense.cli.list:show_list", "List teachers, students, methods and losses."),
    ("inspect", "moe2dense.cli.inspect:inspect", "Show a checkpoint's shape and routing, or a run's report."),
    ("targets", "moe2dense.cli.targets:targets", "Store the teacher's targets on a text."),
    (
        "distill",
        "moe2dense.cli.distill:distill_checkpoint",
        "Train a dense checkpoint on a teacher or its stored targets.",
    ),
    ("generate", "moe2dense.cli.generate:generate_text", "Let a teacher write text to train on."),
    ("eval", "moe2dense.cli.evaluate:evaluate_checkpoint", "Compare a dense checkpoint with its teacher."),
    ("report", "moe2dense.reporting.show:show_report", "Write a run's report again, or compare two runs."),
    ("export", "moe2dense.cli.export:export_checkpoint", "Write a student for transformers, vLLM or llama.cpp."),
    ("doctor", "moe2dense.cli.doctor:doctor", "Show versions, devices, and which optional parts are on."),
)
for _name, _where, _help in COMMANDS:
    app.command(_where, name=_name, help=_help)
