"""The command line. Each command is a Python function: its parameters are the flags, its docstring the help."""

from cyclopts import App

from moe2dense import __version__

app = App(
    name="moe2dense",
    help="Turn a sparse Mixture-of-Experts language model into a dense one that behaves like it.",
    version=__version__,
    help_format="plaintext",
    default_parameter=None,
)

# import strings: a command's module is loaded when that command is asked for
app.command("moe2dense.pipeline:convert", name="convert")
app.command("moe2dense.pipeline:plan", name="plan")
app.command("moe2dense.verbs.listing:show_list", name="list")
app.command("moe2dense.verbs.inspecting:inspect", name="inspect")
app.command("moe2dense.verbs.targets:targets", name="targets")
app.command("moe2dense.verbs.distilling:distill_checkpoint", name="distill")
app.command("moe2dense.verbs.evaluating:evaluate_checkpoint", name="eval")
app.command("moe2dense.verbs.reporting:show_report", name="report")
app.command("moe2dense.verbs.exporting:export_checkpoint", name="export")
app.command("moe2dense.verbs.doctor:doctor", name="doctor")
