"""`moe2dense export`: a run's student, or any dense checkpoint, for serving."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from moe2dense.config.flags import argument
from moe2dense.errors import UserError


def export_checkpoint(
    what: Annotated[
        str,
        argument(
            "Folder of a run, of a step of its training (RUN/checkpoints/step-000050), or of a dense checkpoint.",
            example="out/first",
        ),
    ],
    /,
    *,
    out: Annotated[Path, argument("New folder.", example="out/gguf")],
    overwrite: Annotated[bool, argument("Replace --out.")] = False,
    format: Annotated[
        Literal["hf", "gguf"],
        argument("File layout: transformers and vLLM (hf) or llama.cpp (gguf).", group="Output", example="gguf"),
    ] = "hf",
    quantize: Annotated[
        Literal["int8", "int4", "q8_0"] | None,
        argument("int8 or int4 (hf; needs --data), q8_0 (gguf).", group="Output", example="q8_0"),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        argument("Number format of the weights.", group="Output", example="float16"),
    ] = "bfloat16",
    shard_size: Annotated[
        str, argument("Largest weight file.", group="Output", unit="bytes", example="2GB", metavar="SIZE")
    ] = "5GB",
    tokenizer: Annotated[
        str | None,
        argument(
            "Folder with the tokenizer.", group="Output", example="examples/tiny-mixtral", default="the teacher's"
        ),
    ] = None,
    data: Annotated[
        str | None,
        argument(
            "Text that calibrates and judges quantised weights.",
            group="Text",
            example="my-text.jsonl",
            default="none: needed for int8 and int4",
        ),
    ] = None,
    max_kl: Annotated[
        float,
        argument(
            "Refuse a quantised model further than this from the unquantised.",
            group="Text",
            unit="nats per token",
            example="0.05",
        ),
    ] = 0.1,
    push_to_hub: Annotated[
        str | None,
        argument(
            "Repository to upload the export to, private unless it exists or with --public.",
            group="Upload",
            example="my-name/my-model",
            default="no upload",
        ),
    ] = None,
    public: Annotated[bool, argument("Create that repository public.", group="Upload")] = False,
    yes: Annotated[bool, argument("Upload without asking.", group="Upload")] = False,
) -> None:
    """Write a student for transformers and vLLM (hf) or llama.cpp (gguf), and check what was written."""
    if push_to_hub and not yes and not sys.stdin.isatty():
        raise UserError("--push-to-hub asks before it uploads, and there is no terminal to ask on; add --yes")
    if quantize in ("int8", "int4") and data is None:
        raise UserError(f"--quantize {quantize} needs --data, the text that calibrates and judges it")

    from moe2dense.cli.actions.export import push, run_export

    folder = run_export(
        what,
        out,
        format=format,
        quantize=quantize,
        dtype=dtype,
        shard_size=shard_size,
        tokenizer=tokenizer,
        data=data,
        max_kl=max_kl,
        overwrite=overwrite,
    )
    if push_to_hub:
        push(folder, push_to_hub, public, yes)
