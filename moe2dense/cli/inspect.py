"""`moe2dense inspect`: a checkpoint's shape and routing, or a run's transfer report."""

from typing import Annotated

from moe2dense.config.flags import argument, flag, given_options
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags


def inspect(
    what: Annotated[
        str, argument("Folder of a checkpoint, hub id, known name, or folder of a run.", example="mixtral")
    ],
    /,
    *,
    data: Annotated[
        str | None,
        argument(
            "Text to route, for the load of every expert, and to show as it is learnt.",
            example="my-text.jsonl",
            default="none: shape only",
        ),
    ] = None,
    tokens: Annotated[
        str, argument("How much of it is routed.", unit="tokens", example="100k", metavar="COUNT")
    ] = "16k",
    json: Annotated[bool, argument("Print JSON instead of tables.")] = False,
    block: Annotated[int | None, flag("data.block")] = None,
    chat_template: Annotated[str | None, flag("data.chat_template")] = None,
    memory: Annotated[str | None, flag("teacher.memory")] = None,
    gpu_memory: Annotated[str | None, flag("teacher.gpu_memory")] = None,
    teacher_card: Annotated[str | None, flag("teacher.card")] = None,
) -> None:
    """Show a checkpoint's shape and, with --data, how its experts are used and what of the text is learnt; or the report of a run."""
    settings = merge_flags(RunConfig(), given_options(inspect, locals()))

    from moe2dense.cli.actions.inspect import inspect_checkpoint, inspect_run, is_run_folder

    if is_run_folder(what):
        inspect_run(what, as_json=json)
    else:
        inspect_checkpoint(what, data, tokens, settings, as_json=json)
