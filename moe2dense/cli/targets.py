"""`moe2dense targets`: the teacher's distributions on a text, stored for training without the teacher, and looked at."""

from pathlib import Path
from typing import Annotated, Literal

from moe2dense.config.flags import argument, flag, given_options
from moe2dense.config.schema import RunConfig
from moe2dense.config.toml import merge_flags

Format = Literal["hidden", "sampled", "topk", "full"]


def targets(
    teacher: Annotated[
        str,
        argument(
            "The teacher: folder of a checkpoint, hub id, or a known name. With --endpoint only its tokenizer is read.",
            example="mixtral",
        ),
    ],
    /,
    *,
    data: Annotated[
        str,
        argument("Text: a folder with train/valid/test files, one file, or a hub id.", example="my-text.jsonl"),
    ],
    out: Annotated[
        str | Path | None,
        argument(
            "Folder of the store, or a URL of an object store, to which each shard is written as it is made; an unfinished one is continued.",
            example="s3://bucket/targets",
            default="none: needed, but with --analyze",
        ),
    ] = None,
    tokens: Annotated[
        str, argument("How much of the text the teacher reads.", unit="tokens", example="20m", metavar="COUNT")
    ] = "500k",
    analyze: Annotated[
        bool, argument("Print what the teacher's soft labels on this text say beyond the text.")
    ] = False,
    format: Annotated[
        Format,
        argument(
            "What is stored. hidden and full serve every loss, sampled forward KL, topk forward KL and hard labels. A server gives topk.",
            group="Output",
            example="sampled",
        ),
    ] = "hidden",
    k: Annotated[
        int, argument("topk: how many of the likeliest tokens are kept.", group="Output", unit="tokens", example="64")
    ] = 32,
    draws: Annotated[
        int,
        argument("sampled: how many tokens are drawn at each position.", group="Output", unit="tokens", example="100"),
    ] = 50,
    temperature: Annotated[
        float, argument("sampled and topk serve this one temperature only.", group="Output", example="2")
    ] = 1.0,
    features: Annotated[
        str,
        argument(
            "Store hidden states, attention and the like of some layers too, written as train.features; for a student as deep "
            "as the teacher.",
            group="Output",
            example="mse:uniform+attention:last",
        ),
    ] = "",
    token_weights: Annotated[
        str,
        argument(
            "Store how the teacher routed each token: router-entropy, expert-saliency, or both with a comma.",
            group="Output",
            example="router-entropy",
        ),
    ] = "",
    json: Annotated[bool, argument("With --analyze, print JSON instead of tables.", group="Output")] = False,
    endpoint: Annotated[str | None, flag("endpoint.url")] = None,
    endpoint_model: Annotated[str | None, flag("endpoint.model")] = None,
    endpoint_kind: Annotated[str | None, flag("endpoint.kind")] = None,
    endpoint_parallel: Annotated[int | None, flag("endpoint.parallel")] = None,
    endpoint_rate: Annotated[float | None, flag("endpoint.rate")] = None,
    block: Annotated[int | None, flag("data.block")] = None,
    chat_template: Annotated[str | None, flag("data.chat_template")] = None,
    seed: Annotated[int | None, flag("seed", group="Text")] = None,
    memory: Annotated[str | None, flag("teacher.memory")] = None,
    gpu_memory: Annotated[str | None, flag("teacher.gpu_memory")] = None,
    experts: Annotated[str | None, flag("teacher.experts")] = None,
    device: Annotated[str | None, flag("teacher.device")] = None,
    attention: Annotated[str | None, flag("attention")] = None,
    teacher_card: Annotated[str | None, flag("teacher.card")] = None,
) -> None:
    """Stream the teacher once and store its targets for `moe2dense distill --targets`.

    With --endpoint a server that runs the teacher is asked for the k likeliest tokens of every position instead. Under
    torchrun every process writes its share of the store.
    """
    settings = merge_flags(RunConfig(), given_options(targets, locals()))

    from moe2dense.cli.actions.served_targets import run_served_targets
    from moe2dense.cli.actions.targets import TargetsRequest, run_targets

    request = TargetsRequest(
        teacher=teacher,
        data=data,
        out=out,
        tokens=tokens,
        settings=settings,
        format=format,
        k=k,
        draws=draws,
        temperature=temperature,
        features=features,
        token_weights=tuple(name.strip() for name in token_weights.split(",") if name.strip()),
    )
    if settings.endpoint.url:
        run_served_targets(request, analyze=analyze)
    else:
        run_targets(request, analyze=analyze, as_json=json)
