"""Targets from a served teacher beside those of the same teacher streamed: what is asked, what it takes, and what training makes of them.

    python benchmarks/served.py --vllm VENV/bin/vllm [--tokens 98304] [--k 64] [--data FOLDER]

vLLM serves examples/tiny-mixtral on this machine. `moe2dense targets --endpoint` is killed after a third of the answers and started
again; after two thirds the server is killed, the command fails, and both are started again. How many prompt tokens each server
was asked for is read from its own /metrics. Then one student (obs+refit, 3.2m) is trained on the same tokens from each kind of targets.
"""

import argparse
import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe2dense.config.training import TrainConfig
from moe2dense.data.load import load_blocks
from moe2dense.distillation.api import distill
from moe2dense.distillation.targets.memory import hidden_targets
from moe2dense.distillation.targets.store import open_targets, read_manifest
from moe2dense.distillation.targets.write import write_targets
from moe2dense.student.build.api import build_student
from moe2dense.teacher.load import load_teacher

TEACHER = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
BLOCK = 192  # the example has 256 positions, and a server needs one for the token that it writes


class Vllm:
    """vLLM serving the example on a port of this machine, and how many prompt tokens it was asked for in all its lives."""

    def __init__(self, binary: str, port: int, k: int, log: Path):
        self.binary, self.port, self.k, self.log, self.tokens = binary, port, k, log, 0
        self.url = f"http://127.0.0.1:{port}/v1"

    def start(self) -> None:
        command = [
            self.binary, "serve", str(TEACHER), "--dtype", "float32", "--max-logprobs", str(self.k), "--enforce-eager",
            "--max-model-len", "256", "--port", str(self.port), "--served-model-name", "teacher", "--max-num-seqs", "8",
        ]  # fmt: skip
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 300
        while self._get("/v1/models") is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"vLLM does not start; see {self.log}")
            time.sleep(1)

    def stop(self) -> None:
        metrics = self._get("/metrics") or ""
        self.tokens += sum(int(float(n)) for n in re.findall(r"^vllm:prompt_tokens_total\{.*\} (\S+)", metrics, re.M))
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _get(self, path: str) -> str | None:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).read().decode()
        except (urllib.error.URLError, OSError):
            return None


def ask(server: Vllm, store: Path, args) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "moe2dense", "targets", str(TEACHER), "--data", args.data, "--tokens", str(args.tokens),
        "--block", str(BLOCK), "--endpoint", server.url, "--k", str(args.k), "--out", str(store), "--endpoint-parallel", "2",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(store: Path, blocks: int, client: subprocess.Popen) -> int:
    """Wait until the answers of so many blocks are there; return how many are."""
    while client.poll() is None:
        there = 0
        for part in (store / "parts").glob("*.safetensors"):
            start, stop = map(int, part.stem.split("-"))
            there += stop - start
        if there >= blocks:
            return there
        time.sleep(0.05)
    return -1


def collect(server: Vllm, store: Path, args) -> None:
    """Collect the targets with two interruptions, and print what was asked for."""
    blocks = args.tokens // BLOCK
    server.start()
    start = time.perf_counter()
    client = ask(server, store, args)
    killed_at = wait_for(store, blocks // 3, client)
    client.send_signal(signal.SIGKILL)
    client.wait()
    client = ask(server, store, args)
    gone_at = wait_for(store, 2 * blocks // 3, client)
    server.stop()
    _, error = client.communicate()
    print(
        f"the client was killed at {killed_at} of {blocks} blocks, the server at {gone_at}; then: {error.strip().splitlines()[-1]}"
    )
    server.start()
    client = ask(server, store, args)
    client.communicate()
    server.stop()
    manifest = read_manifest(store)
    print(f"seconds with both restarts: {time.perf_counter() - start:.0f}")
    print(f"tokens of the text: {blocks * BLOCK}; prompt tokens that the servers were asked for: {server.tokens}")
    print(json.dumps(manifest["source"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", required=True, help="vLLM's command, of an environment of its own")
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--port", type=int, default=8712)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", default=str(TEACHER.parent / "text"))
    parser.add_argument("--store", default="", help="targets that were collected before; nothing is served then")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = Path(args.store) if args.store else folder / "served"
        if not args.store:
            collect(Vllm(args.vllm, args.port, args.k, folder / "vllm.log"), store, args)
        compare(store, folder, args)


def compare(store: Path, folder: Path, args) -> None:
    """Train the same student on each kind of targets, and print the held-out KL."""
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    blocks = load_blocks(args.data, tokenizer, BLOCK, tokens=args.tokens)
    valid = load_blocks(args.data, tokenizer, BLOCK, "valid", tokens=96 * BLOCK)
    served = open_targets(store, blocks, tokenizer=tokenizer)
    own = open_targets(write_targets(teacher, blocks, folder / "topk", "topk", k=args.k), blocks)
    rows = list(range(min(64, len(blocks))))
    a, b = served.batch(rows), own.batch(rows)
    print(
        f"the same {args.k} ids in order at {(a.ids == b.ids).all(1).float().mean():.2%} of the positions, the likeliest at "
        f"{(a.ids[:, 0] == b.ids[:, 0]).float().mean():.3%}; largest difference of a log-probability at the same ids "
        f"{(a.log_p - b.log_p)[a.ids == b.ids].abs().max():.2g}"
    )
    targets = {
        "served, topk": served,
        "streamed, topk": own,
        "streamed, sampled": open_targets(write_targets(teacher, blocks, folder / "sampled", "sampled"), blocks),
        "streamed, hidden": open_targets(write_targets(teacher, blocks, folder / "hidden"), blocks),
    }
    start = build_student(load_teacher(TEACHER), to="3.2m", data=blocks[: 49152 // BLOCK], init="obs+refit")
    valid_targets = hidden_targets(teacher, valid)
    config = TrainConfig(features="", eval_every=10**9)
    print(f"\n{'targets':20s} {'KL before':>10s} {f'KL after {blocks.tokens} tokens':>26s}")
    for name, answers in targets.items():
        runs = [
            distill(
                copy.deepcopy(start), data=blocks, targets=answers, valid=valid, valid_targets=valid_targets, config=config,
                seed=seed,
            )
            for seed in range(args.seeds)
        ]  # fmt: skip
        shown = " ".join(f"{run.history[-1]['valid_kl']:.4f}" for run in runs)
        print(f"{name:20s} {runs[0].history[0]['valid_kl']:10.4f} {shown:>26s}", flush=True)


if __name__ == "__main__":
    main()
