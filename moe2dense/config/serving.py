"""Options of servers: of one that runs the teacher, and of what the student is exported for."""

from dataclasses import dataclass

from moe2dense.config.options import option


@dataclass(frozen=True)
class EndpointConfig:
    """A teacher that a server runs. With log-probabilities it gives targets, without it gives text alone."""

    url: str = option(
        "",
        help="URL of a server that runs the teacher.",
        example="http://localhost:8000/v1",
        shown="none",
        flag="--endpoint",
    )
    model: str = option(
        "",
        help="The name the server knows the model by.",
        example="my-model",
        shown="the server's only one",
        flag="--endpoint-model",
    )
    k: int = option(
        0,
        help="How many log-probabilities of each position are asked for. 0: distill learns from the server's text alone, and "
        "convert asks for 64.",
        example="64",
        shown="0",
        flag="--endpoint-k",
    )
    kind: str = option(
        "auto",
        help="Which server it is.",
        choices=("auto", "vllm", "sglang", "llama.cpp"),
        example="sglang",
        shown="auto: what it says it is",
        flag="--endpoint-kind",
    )
    parallel: int = option(
        4,
        help="Requests that are under way together.",
        unit="requests",
        example="16",
        flag="--endpoint-parallel",
    )
    rate: float = option(
        0.0,
        help="The most requests a second.",
        unit="requests",
        example="2",
        shown="0: no limit",
        flag="--endpoint-rate",
    )


@dataclass(frozen=True)
class ExportConfig:
    """What the deployable checkpoint looks like."""

    dtype: str = option(
        "bfloat16",
        help="Number format of the exported weights.",
        choices=("bfloat16", "float16", "float32"),
        example="float16",
    )
    format: str = option(
        "hf",
        help="File layout: transformers and vLLM (hf) or llama.cpp (gguf).",
        choices=("hf", "gguf"),
        example="gguf",
    )
    quantize: str = option(
        "",
        help="Quantise the exported weights: int8 or int4 for hf, q8_0 or a k-quant of llama.cpp's llama-quantize for gguf.",
        choices=("", "int8", "int4", "q8_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs"),
        example="int8",
        shown="none",
    )
    shard_size: str = option("5GB", help="Largest weight file.", unit="bytes", example="2GB")
    stack: str = option(
        "",
        help="The program that will serve the student. A host that it does not serve is replaced where another computes the same, and "
        "refused with the reason where none does.",
        choices=("", "vllm", "llama.cpp", "mlx", "transformers"),
        example="vllm",
        shown="any",
        flag="--for",
    )
