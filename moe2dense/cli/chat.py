"""`moe2dense chat`: talk with a student at the terminal, side by side with its teacher."""

from pathlib import Path
from typing import Annotated

from moe2dense.config.flags import argument, flag, given_options
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags


def chat(
    what: Annotated[str, argument("Folder of a run, of an export, or of a dense checkpoint.", example="out/first")],
    /,
    *,
    teacher: Annotated[
        str | None,
        argument(
            "The teacher, to answer beside the student: folder of a checkpoint, hub id or a known name.",
            example="mixtral",
            default="none: the student alone",
        ),
    ] = None,
    tokens: Annotated[int, argument("The longest answer.", unit="tokens", example="200")] = 128,
    temperature: Annotated[
        float, argument("How freely words are drawn; 0 takes the likeliest each time.", example="0.8")
    ] = 0.7,
    top_p: Annotated[
        float,
        argument("Draw only among the likeliest tokens that hold this much probability together.", example="0.95"),
    ] = 0.9,
    seed: Annotated[int | None, flag("seed")] = None,
    memory: Annotated[str | None, flag("teacher.memory")] = None,
    gpu_memory: Annotated[str | None, flag("teacher.gpu_memory")] = None,
    device: Annotated[str | None, flag("teacher.device")] = None,
    teacher_card: Annotated[str | None, flag("teacher.card")] = None,
) -> None:
    """Talk with a student; with --teacher both answer, side by side. An empty line, or end of input, ends it.

    A tokenizer with a chat template is spoken to in turns; without one the model continues what you write.
    """
    settings = merge_flags(RunConfig(), given_options(chat, locals()))

    from moe2dense.cli.actions.chat import run_chat

    run_chat(Path(what), teacher, settings, tokens=tokens, temperature=temperature, top_p=top_p)
