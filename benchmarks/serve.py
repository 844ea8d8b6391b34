"""Serving a teacher against its dense student on this machine: prefill and decode speed, memory, size on disk, cold load.

    python benchmarks/serve.py TEACHER STUDENT [STUDENT.gguf ...]     # any transformers folders and GGUF files
    python benchmarks/serve.py                                        # a synthetic pair: 8 experts top-2, and one expert's width
    python benchmarks/serve.py --hidden 256 --layers 2 --repeats 1    # a quick look

Speed and memory depend on shapes, not on what the weights say, so the synthetic pair has random weights; it is deleted afterwards.
With llama.cpp (pip install xllamacpp) the student is measured as a q8_0 GGUF file too.
Each measurement is a process of its own. Cold load: the page cache of the files is dropped first, then the time until the first token
of a one-token prompt. Prefill: one prompt of --prompt tokens. Decode: --decode greedy tokens after it, one at a time, with the cache.
Peak memory: the process's largest resident set, Python and torch included (on a GPU, its largest allocation). Of --repeats processes the median is shown, with
the range of the decode speed. transformers computes in fp32 on CPU and in bf16 on a GPU; llama.cpp in its own types.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.utils import logging

from moe2dense.exporting.api import export
from moe2dense.families.cards import teacher_cards
from moe2dense.student.target.resolve import resolve_target


def synthetic(folder: Path, hidden: int, layers: int) -> list[Path]:
    """Write a random Mixtral (8 experts, top-2, width 3.5 H) and its dense student of one expert's width, in bf16; return their folders."""
    width = hidden * 7 // 2 // 32 * 32
    config = MixtralConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_local_experts=8,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), num_experts_per_tok=2,
        max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    logging.disable_progress_bar()
    dense = resolve_target(str(_dense_size(config)), config, teacher_cards()["mixtral"]).config
    paths = []
    for name, shape in (("teacher", config), ("student", dense)):
        shape.dtype = torch.bfloat16
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        paths.append(folder / name)
    if importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf"):
        words = Path(__file__).parent.parent / "examples" / "tiny-mixtral"  # any tokenizer will do for timing
        exported = export(model, folder / "gguf", tokenizer=words, format="gguf", quantize="q8_0")
        paths.append(exported.path / "model-q8_0.gguf")
    return paths


def _dense_size(config: Any) -> int:
    """Return the parameters of a model with one expert's width per layer."""
    h, kv = config.hidden_size, config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    layer = 2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size + 2 * h
    return 2 * config.vocab_size * h + config.num_hidden_layers * layer + h


def weights(model: Path) -> list[Path]:
    """Return the weight files of a folder, or the GGUF file itself."""
    return [model] if model.suffix == ".gguf" else sorted(model.glob("*.safetensors"))


def drop_cache(files: list[Path]) -> None:
    """Forget the files' pages, so that loading reads the disk."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path, prompt: int, decode: int) -> dict[str, float]:
    """Measure one model in this process."""
    drop_cache(weights(model))
    numbers = _llama_cpp(model, prompt, decode) if model.suffix == ".gguf" else _transformers(model, prompt, decode)
    # VmHWM is of this program; ru_maxrss would count the process it was forked from
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    if torch.cuda.is_available() and model.suffix != ".gguf":
        peak = torch.cuda.max_memory_allocated()
    return numbers | {"peak": peak, "size": sum(p.stat().st_size for p in weights(model))}


def _transformers(folder: Path, prompt: int, decode: int) -> dict[str, float]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model = model.to(device).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        model(input_ids=ids[:, :1])
        load = now() - start
        model(input_ids=ids)  # warm
        start = now()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = now() - start
        start = now()
        for _ in range(decode):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        spent = now() - start
    return {"load": load, "prefill": prompt / prefill, "decode": decode / spent}


def _llama_cpp(path: Path, prompt: int, decode: int) -> dict[str, float]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.warmup = str(path), -1, False
    params.n_ctx, params.n_parallel = prompt + decode + 8, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    start = time.perf_counter()
    server = xllamacpp.Server(params)

    def ask(ids: list[int], tokens: int) -> dict[str, Any]:
        body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    ask([1], 1)
    load = time.perf_counter() - start
    ids = torch.randint(3, 1000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    ask(ids, 1)  # warm
    timings = ask(ids, decode)["timings"]
    return {"load": load, "prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}


def child(model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--child",
        str(model),
        "--prompt",
        str(args.prompt),
        "--decode",
        str(args.decode),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{model}: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table: medians, and the factor over the first row."""
    lines = [
        "| model | files | peak memory | cold load | prefill tokens/s | decode tokens/s (range) |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[str, float] | None = None
    for name, runs in rows.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        low, high = min(r["decode"] for r in runs), max(r["decode"] for r in runs)
        speed = "" if first is None else f", {middle['decode'] / first['decode']:.1f}x"
        fill = "" if first is None else f" ({middle['prefill'] / first['prefill']:.1f}x)"
        first = first or middle
        lines.append(
            f"| {name} | {middle['size'] / 1e6:,.0f} MB | {middle['peak'] / 1e6:,.0f} MB | {middle['load']:.2f} s | "
            f"{middle['prefill']:,.0f}{fill} | {middle['decode']:,.1f} ({low:,.1f} to {high:,.1f}{speed}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write every number there")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.prompt, args.decode)))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = args.models or synthetic(Path(folder), args.hidden, args.layers)
        rows: dict[str, list[dict[str, float]]] = {str(m.name): [] for m in models}
        for _ in range(args.repeats):  # models alternate, so that a busy minute does not fall on one of them
            for model in models:
                rows[model.name].append(child(model, args))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; prompt {args.prompt}, decode {args.decode}, median of {args.repeats}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
