"""`moe2dense export`: a run's student, or any dense checkpoint, for serving."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from moe2dense.common.object_store import is_url
from moe2dense.config.flags import argument
from moe2dense.errors import UserError


def export_checkpoint(
    what: Annotated[
        str,
        argument(
            "Folder of a run, of a step of its training (RUN/checkpoints/step-000050), or of a dense checkpoint; for distillkit a store "
            "of targets.",
            example="out/first",
        ),
    ],
    /,
    *,
    out: Annotated[
        str | Path,
        argument("New folder, or a URL of an object store that is empty there.", example="s3://bucket/model"),
    ],
    overwrite: Annotated[bool, argument("Replace --out.")] = False,
    format: Annotated[
        Literal["hf", "gguf", "distillkit"],
        argument(
            "File layout: transformers and vLLM (hf) or llama.cpp (gguf); of a store of targets, DistillKit's packed log-probabilities "
            "(distillkit; needs --data and --tokenizer).",
            group="Output",
            example="gguf",
        ),
    ] = "hf",
    quantize: Annotated[
        Literal["int8", "int4", "q8_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs"] | None,
        argument(
            "int8 or int4 (hf; needs --data), q8_0 (gguf), or a k-quant (gguf) of llama.cpp's llama-quantize, with an importance matrix of "
            "--data where given.",
            group="Output",
            example="q8_0",
        ),
    ] = None,
    stack: Annotated[
        Literal["vllm", "llama.cpp", "mlx", "transformers"] | None,
        argument(
            "The program that will serve the student: sets --format, and a host that it does not serve is refused with the reason.",
            group="Output",
            example="vllm",
            default="any",
            name="--for",
        ),
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
            "Text that calibrates and judges quantised weights, or that targets were stored for.",
            group="Text",
            example="my-text.jsonl",
            default="none: needed for int8, int4 and distillkit",
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
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        argument(
            "Where quantised weights are calibrated and judged; auto is the GPU where there is one and they fit.",
            group="Text",
            example="cpu",
        ),
    ] = "auto",
    tokens: Annotated[
        str | None,
        argument(
            "distillkit: how much of the text, as when it was stored.",
            group="Text",
            unit="tokens",
            example="500k",
            default="all there is",
        ),
    ] = None,
    k: Annotated[
        int,
        argument(
            "distillkit: how many of the likeliest tokens, of targets that know more.",
            group="Text",
            unit="tokens",
            example="128",
        ),
    ] = 64,
    seed: Annotated[
        int, argument("distillkit: the seed that the targets were stored with.", group="Text", example="1")
    ] = 0,
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
    """Write a student for transformers and vLLM (hf) or llama.cpp (gguf), and check what was written.

    With --format distillkit a store of targets is written as DistillKit's trainers read it.
    """
    if push_to_hub and not yes and not sys.stdin.isatty():
        raise UserError("--push-to-hub asks before it uploads, and there is no terminal to ask on; add --yes")
    if push_to_hub and is_url(out):
        raise UserError(f"--push-to-hub uploads a folder of this machine; found --out {out}")
    if quantize in ("int8", "int4") and data is None:
        raise UserError(f"--quantize {quantize} needs --data, the text that calibrates and judges it")

    if format == "distillkit":
        if data is None or tokenizer is None:
            raise UserError(
                "--format distillkit needs --data and --tokenizer, the text and the tokenizer that the targets were stored with"
            )
        if quantize or push_to_hub:
            raise UserError("--format distillkit writes targets, not a model; leave out --quantize and --push-to-hub")
        if is_url(out):
            raise UserError(f"--format distillkit writes to a folder of this machine; found --out {out}")

        from moe2dense.cli.actions.export_targets import run_export_targets

        run_export_targets(
            what, Path(out), data=data, tokenizer=tokenizer, tokens=tokens, seed=seed, k=k, overwrite=overwrite
        )
        return

    from moe2dense.cli.actions.export import push, run_export

    run_export(
        what,
        out,
        format=format,
        quantize=quantize,
        dtype=dtype,
        shard_size=shard_size,
        tokenizer=tokenizer,
        data=data,
        max_kl=max_kl,
        device=device,
        stack=stack or "",
        overwrite=overwrite,
    )
    if push_to_hub:
        push(Path(out), push_to_hub, public, yes)
