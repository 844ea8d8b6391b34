"""Run a whole conversion: plan, build, targets, distill, evaluate, report, export.

The one package that knows all stages. Settings come in; a run folder goes out, finished stage by stage and resumable.
(The function is `moe2dense.convert`; a package of that name would hide it.)
"""
