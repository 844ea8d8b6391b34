"""Tokenise many tokens of synthetic text into mapped blocks: seconds, memory above the start, blocks a second, resuming.

    python benchmarks/text.py --tokens 100m

The peer is what the same loader does in memory on the first --small tokens, in processes of their own, alternating with ours on
the same tokens. The large text is stopped in the middle once (the process is killed) and goes on; its blocks then equal those of
a text that was not stopped. Memory is read while it works: all of it, and without the pages of mapped files, which the system
takes back when it needs them.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moe2dense.common.units import parse_count

ROOT = Path(__file__).parents[1]
BLOCK, ROUNDS = 2048, 3

CHILD = """
import json, sys, threading, time
import psutil, torch
from transformers import AutoTokenizer
from moe2dense.data import tokenise
from moe2dense.data.load import load_blocks

path, tokens, large, tokenizer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tokenise.LARGE = 0 if large else 2**62
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
tokenizer("warm up")
process, peaks, stop = psutil.Process(), [0, 0], threading.Event()

def memory():
    info = process.memory_info()
    return info.rss, info.rss - info.shared

def watch():
    while not stop.wait(0.05):
        for i, value in enumerate(memory()):
            peaks[i] = max(peaks[i], value)

start, clock = memory(), time.perf_counter()
threading.Thread(target=watch, daemon=True).start()
blocks = load_blocks(path, tokenizer, 2048, "all", tokens)
seconds = time.perf_counter() - clock
again = time.perf_counter()
load_blocks(path, tokenizer, 2048, "all", tokens) if large else None
opened = time.perf_counter() - again
order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
clock, count = time.perf_counter(), min(len(blocks), 4096)
for i in range(0, count, 8):
    part = blocks[order[i : i + 8]]
    part.labels(), part.loss_mask()
rate = count / (time.perf_counter() - clock)
import hashlib
digest = hashlib.sha256("".join(blocks.keys()).encode()).hexdigest()
stop.set()
print(json.dumps({"seconds": seconds, "opened": opened, "blocks": len(blocks), "rate": rate, "digest": digest,
                  "memory": peaks[0] - start[0], "own": peaks[1] - start[1]}))
"""


def synthetic(path: Path, size: int) -> None:
    """Write `size` bytes of records of words drawn by Zipf's law, with lengths from 20 to 2000 words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(5000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    pool = [" ".join(draw.choices(words, weights, k=200)) for _ in range(2000)]
    with path.open("w") as file:
        while file.tell() < size:
            text = " ".join(draw.choices(pool, k=draw.randint(1, 8)))
            file.write(json.dumps({"text": text}) + "\n")


def run(path: Path, tokens: int, large: bool, cache: Path, kill_after: float = 0.0) -> dict | None:
    """Load the text in a process of its own; return its numbers, None where it was killed after so many seconds."""
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(path),
        str(tokens),
        str(int(large)),
        str(ROOT / "examples/tiny-mixtral"),
    ]
    environment = os.environ | {"MOE2DENSE_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    if kill_after:
        state = cache / "text"
        while time.sleep(0.2) is None and process.poll() is None:
            done = [json.loads(p.read_text())["numbering"]["tokens"] for p in state.glob("*/text.json")]
            if done and done[0] >= kill_after * tokens:
                process.kill()
                process.wait()
                return {"tokens": done[0]}
    output, _ = process.communicate()
    assert process.returncode == 0, "the loader failed"
    return json.loads(output.splitlines()[-1])


def spread(values: list[float], unit: float = 1.0, digits: int = 1) -> str:
    """Show a median with the range."""
    low, middle, high = (x / unit for x in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="100m", type=parse_count)
    parser.add_argument("--small", default="2m", type=parse_count)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        synthetic(text, int(options.tokens * 3.2))
        print(
            f"text: {text.stat().st_size / 1e6:.0f} MB of JSON lines; blocks of {BLOCK}; one thread unless told otherwise"
        )
        rows: dict[bool, list[dict]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for large in (False, True):
                shutil.rmtree(folder / "small", ignore_errors=True)
                rows[large].append(run(text, options.small, large, folder / "small") or {})
        assert len({r["digest"] for r in rows[False] + rows[True]}) == 1, "mapped blocks differ from those in memory"
        print(f"\n{options.small / 1e6:.0f}M tokens, {ROUNDS} rounds in turn; median (range)")
        print(
            "| | seconds | tokens/s | MB above the start | bytes a token | blocks/s taken at random |\n|---|---|---|---|---|---|"
        )
        for large, name in ((False, "in memory"), (True, "mapped")):
            own = [r["own"] for r in rows[large]]
            print(
                f"| {name} | {spread([r['seconds'] for r in rows[large]])} | "
                f"{spread([options.small / r['seconds'] for r in rows[large]], 1e3, 0)}k | {spread(own, 1e6, 0)} | "
                f"{statistics.median(own) / options.small:.1f} | {spread([r['rate'] for r in rows[large]], 1, 0)} |"
            )
        seconds = {large: statistics.median(r["seconds"] for r in rows[large]) for large in rows}
        print(f"ratio of seconds, mapped / in memory: {seconds[True] / seconds[False]:.2f}")
        stopped = run(text, options.tokens, True, folder / "large", kill_after=0.5)
        clock = time.perf_counter()
        resumed = run(text, options.tokens, True, folder / "large")
        assert stopped is not None and resumed is not None
        print(
            f"\n{options.tokens / 1e6:.0f}M tokens: killed at {stopped['tokens'] / 1e6:.0f}M, finished in "
            f"{time.perf_counter() - clock:.0f} s more; {resumed['blocks']} blocks"
        )
        print(
            f"memory above the start: {resumed['own'] / 1e6:.0f} MB, {resumed['memory'] / 1e6:.0f} MB with mapped pages; "
            f"opened again in {resumed['opened']:.1f} s; {resumed['rate']:.0f} blocks/s taken at random with labels and masks"
        )
        size = sum(f.stat().st_size for f in (folder / "large").rglob("*") if f.is_file())
        print(f"disk: {size / 1e6:.0f} MB, {size / options.tokens:.1f} bytes a token")
        whole = run(text, options.tokens, True, folder / "whole")
        assert whole is not None and whole["digest"] == resumed["digest"], "the resumed text differs from the whole one"
        print(
            f"not stopped: {whole['seconds']:.0f} s, {options.tokens / whole['seconds'] / 1e3:.0f}k tokens/s, "
            f"{whole['own'] / 1e6:.0f} MB above the start, {whole['memory'] / 1e6:.0f} MB with mapped pages; the same blocks"
        )


if __name__ == "__main__":
    main()
