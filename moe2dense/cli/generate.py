"""`moe2dense generate`: text written by a teacher, as a dataset that every --data reads."""

from pathlib import Path
from typing import Annotated

from moe2dense.config.flags import argument, flag, given_options
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge, merge_flags, read_toml


def generate_text(
    teacher: Annotated[
        str, argument("The teacher: folder of a checkpoint, hub id, or a known name.", example="mixtral")
    ],
    /,
    *,
    data: Annotated[
        str,
        argument(
            "What is continued: records with text, prompt or messages; a folder with train/valid/test files, one file, or a hub id.",
            example="prompts.jsonl",
        ),
    ],
    out: Annotated[Path, argument("Folder of the text; an unfinished one is continued.", example="out/written")],
    tokens: Annotated[
        str, argument("How much text is kept, prompts included.", unit="tokens", example="2m", metavar="COUNT")
    ] = "500k",
    config: Annotated[Path | None, argument("TOML file whose [write] table sets the same.", example="run.toml")] = None,
    prompt_tokens: Annotated[int | None, flag("write.prompt_tokens")] = None,
    new_tokens: Annotated[int | None, flag("write.new_tokens")] = None,
    temperature: Annotated[float | None, flag("write.temperature")] = None,
    top_p: Annotated[float | None, flag("write.top_p")] = None,
    beams: Annotated[int | None, flag("write.beams")] = None,
    learn_prompt: Annotated[bool | None, flag("write.learn_prompt")] = None,
    min_tokens: Annotated[int | None, flag("write.min_tokens")] = None,
    nll: Annotated[str | None, flag("write.nll")] = None,
    duplicates: Annotated[float | None, flag("write.duplicates")] = None,
    same_script: Annotated[bool | None, flag("write.same_script")] = None,
    block: Annotated[int | None, flag("data.block")] = None,
    seed: Annotated[int | None, flag("seed")] = None,
    memory: Annotated[str | None, flag("teacher.memory")] = None,
    gpu_memory: Annotated[str | None, flag("teacher.gpu_memory")] = None,
    experts: Annotated[str | None, flag("teacher.experts")] = None,
    device: Annotated[str | None, flag("teacher.device")] = None,
    teacher_card: Annotated[str | None, flag("teacher.card")] = None,
) -> None:
    """Let the teacher continue passages, prompts or conversations.

    Leaves shards and where they came from in OUT. Under torchrun every process writes its share of the texts.
    """
    options = given_options(generate_text, locals())
    base = RunConfig()
    if config is not None:
        base = RunConfig(write=merge(base, read_toml(config), f"--config {config}").write)

    from moe2dense.cli.actions.generate import run_generation

    run_generation(teacher, data, out, tokens, merge_flags(base, options))
