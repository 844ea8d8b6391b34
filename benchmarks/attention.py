"""Attention of packed documents: dense masks and tiles in turn, in one run, and the bytes of their masks.

    python benchmarks/attention.py [--lengths 1024 2048 4096] [--document 700] [--heads 8] [--width 64] [--rounds 5] [--device cuda]

A pass forward and backward of attention alone (8 heads on 2 of keys, width 64, one block of documents of 700 tokens), as transformers calls it:
`sdpa` with the mask that transformers makes, and `flex`, which is torch's compiled kernel on a GPU and `attend_by_rows` on a CPU. The first
pass of each, which compiles on a GPU, is not counted. Peak bytes are all storages alive at their highest on a CPU, and what the allocator
says on a GPU. Before that bytes and seconds of masks alone, up to 32k tokens.

Measured on one thread of a CPU that others used too, float32: milliseconds (least to most), as a multiple, and peak memory:

    tokens      dense masks                        tiles
      2048     3250 (3085 to 3348)    57 MB       1421 (1276 to 1526)   2.3x    29 MB
      4096    12849 (11923 to 13825) 155 MB       3205 (3038 to 3266)   4.0x    59 MB
      8192    52969 (51424 to 67576) 478 MB       7616 (7456 to 9702)   7.0x   118 MB

On a GPU it has not been run.
"""

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from moe2dense.modeling.attention import FLEX
from moe2dense.modeling.block_masks import mask_nbytes
from moe2dense.modeling.mask_memory import dense_bytes, tile_bytes

NAMES = {"sdpa": "sdpa", "flex": FLEX}  # ours -> transformers' names
LONGEST = 32768


class Alive(TorchDispatchMode):
    """Adds up the storages that are made within the context and exist, and keeps the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def make_mask(way: str, documents: Tensor) -> Any:
    """Return the mask of one block [S] of documents, as transformers has it made."""

    def rule(block: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[query] == documents[key]) & (key <= query) & (block >= 0)

    return AttentionMaskInterface()[NAMES[way]](
        batch_size=1, q_length=len(documents), kv_length=len(documents), mask_function=rule, allow_is_causal_skip=False,
        device=documents.device,
    )  # fmt: skip


class Attention(nn.Module):
    """What transformers' functions read of a module."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def step(way: str, heads: list[Tensor], documents: Tensor, groups: int) -> list[Tensor]:
    """Return the output and the gradients of one pass, masks included."""
    module, mask = Attention(groups), make_mask(way, documents)
    output = AttentionInterface()[NAMES[way]](module, *heads, mask, scaling=heads[0].shape[3] ** -0.5)[0]
    return [output.detach(), *torch.autograd.grad(output.square().mean(), heads)]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call holds beyond what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with Alive() as alive:
        run()
    return alive.peak


def measure(length: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return seconds, bytes and how far both ways are apart for blocks of one length."""
    torch.manual_seed(0)
    dtype, keys = torch.bfloat16 if device.type == "cuda" else torch.float32, max(1, args.heads // 4)
    sizes = (args.heads, keys, keys)
    heads = [torch.randn(1, n, length, args.width, device=device, dtype=dtype, requires_grad=True) for n in sizes]
    documents = torch.arange(length, device=device) // args.document
    runs = {way: lambda way=way: step(way, heads, documents, args.heads // keys) for way in NAMES}
    results = {way: run() for way, run in runs.items()}
    apart = max(float((a - b).float().norm() / a.float().norm()) for a, b in zip(*results.values(), strict=True))
    del results
    seconds: dict[str, list[float]] = {way: [] for way in NAMES}
    for _ in range(args.rounds):
        for way, run in runs.items():
            seconds[way].append(timed(run, device))
    row: dict[str, Any] = {"length": length, "apart": apart}
    for way, run in runs.items():
        row[way] = {
            "median": statistics.median(seconds[way]), "least": min(seconds[way]), "most": max(seconds[way]),
            "peak": peak_bytes(run, device), "mask": mask_nbytes(make_mask(way, documents)),
        }  # fmt: skip
    return row


def show(row: dict[str, Any]) -> None:
    """Print both ways at one length."""
    ratio = row["sdpa"]["median"] / row["flex"]["median"]
    for way in NAMES:
        r = row[way]
        print(
            f"{row['length']:>7d} {way:>5s} {1e3 * r['median']:>9.1f} {1e3 * r['least']:>9.1f} {1e3 * r['most']:>9.1f} "
            f"{ratio if way == 'flex' else 1:>6.2f} {r['peak'] / 1e6:>9.1f} {r['mask'] / 1e6:>9.3f} {row['apart']:>9.1e}",
            flush=True,
        )


def masks_alone(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Print and return the bytes of one block's mask, and the seconds in which one of tiles is made."""
    print(
        "mask of one block, MB: dense (bool); what SDPA keeps of it in each layer for the backward pass (bfloat16); tiles"
    )
    rows = []
    for length in (4096, 8192, 16384, LONGEST):
        documents = torch.arange(length, device=device) // args.document
        seconds = timed(lambda documents=documents: make_mask("flex", documents), device)
        made = mask_nbytes(make_mask("flex", documents))
        assert made == tile_bytes(1, length), "the plan counts what is made"
        row = {
            "length": length,
            "dense": dense_bytes(1, length),
            "kept": dense_bytes(1, length, 0, 1, 2),
            "tiles": made,
            "seconds": seconds,
        }
        print(
            f"{length:>7d} {row['dense'] / 1e6:>9.1f} {row['kept'] / 1e6:>9.1f} {made / 1e6:>9.3f}   made in {seconds:.2f} s",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--document", type=int, default=700)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}; documents of {args.document} tokens, {args.heads} heads of {args.width}, {args.rounds} rounds in turn\n"
    )
    rows, masks = [], masks_alone(args, device)
    print(
        f"\n{'tokens':>7s} {'':>5s} {'median ms':>9s} {'least':>9s} {'most':>9s} {'x':>6s} {'peak MB':>9s} {'mask MB':>9s} {'apart':>9s}"
    )
    for length in args.lengths:
        rows.append(measure(length, args, device))
        show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"device": name, "passes": rows, "masks": masks}, indent=1))


if __name__ == "__main__":
    main()
