"""Forward KL from hidden states and heads: plain PyTorch, TRL's chunked divergence where trl is installed, and ours.

    python benchmarks/loss.py [--tokens 2048] [--hidden 1024] [--vocabularies 32768 131072 155648] [--rounds 3]

Value and gradients (hidden states and head) in float32. Every case runs in a process of its own; peak extra memory is
the process's highest resident size less that before the call, less the gradients that are its result.

Measured on two cores, TRL 1.16 (its torch path): seconds, as a multiple of plain PyTorch, and peak extra memory:

    vocabulary      plain                TRL                       ours
        32768    4.6 s  1216 MB     9.0 s  1.97x  2958 MB      4.3 s  0.95x   299 MB
       131072   23.0 s  4829 MB    36.8 s  1.60x  2963 MB     19.1 s  0.83x   382 MB (7.9%)
       155648   24.9 s  5735 MB    43.1 s  1.73x  2963 MB     21.5 s  0.86x   387 MB (6.8%)

TRL multiplies with both heads again in its backward pass; ours turns each tile's logits into its gradient at once.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import HiddenRows
from moe2dense.modeling.head import Head


def plain(h, w, ht, wt):
    with torch.no_grad():
        log_p = (ht @ wt.T).log_softmax(-1)
    loss = F.kl_div((h @ w.T).log_softmax(-1), log_p, reduction="batchmean", log_target=True)
    return loss, torch.autograd.grad(loss, (h, w))


def trl(h, w, ht, wt):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(h, w, None, ht, wt, None, 0.0)
    loss = divergence.mean()
    return loss, torch.autograd.grad(loss, (h, w))


def ours(h, w, ht, wt):
    loss = distillation_loss(h, Head(w), HiddenRows(ht, Head(wt))).total
    return loss, torch.autograd.grad(loss, (h, w))


METHODS = {"plain": plain, "trl": trl, "ours": ours}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, tokens: int, hidden: int, vocabulary: int, rounds: int, queue) -> None:
    torch.manual_seed(0)
    h, w = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocabulary, hidden).mul_(0.05).requires_grad_()
    ht, wt = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden).mul_(0.05)
    torch.mm(h[:64].detach(), w[:64].detach().T)
    try:
        METHODS[name](h[:8], w, ht[:8], wt)  # imports and first-call work, not measured
    except ImportError:
        queue.put(None)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    before, seconds = resident(), []
    for _ in range(rounds):
        loss = grads = None  # the last round's gradients are freed first
        start = time.perf_counter()
        loss, grads = METHODS[name](h, w, ht, wt)
        seconds.append(time.perf_counter() - start)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024 - before - sum(g.numel() * g.element_size() for g in grads)
    queue.put({"seconds": min(seconds), "peak": peak, "loss": loss.item(), "norm": float(grads[1].norm())})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 131072, 155648])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    print(f"{args.tokens} tokens, hidden {args.hidden}, float32, best of {args.rounds}\n")
    print(
        f"{'vocabulary':>10s} {'method':>8s} {'seconds':>9s} {'x plain':>8s} {'peak MB':>9s} {'% plain':>8s} {'loss':>12s}"
    )
    for vocabulary in args.vocabularies:
        base = None
        for name in METHODS:
            queue = context.Queue()
            process = context.Process(
                target=measure, args=(name, args.tokens, args.hidden, vocabulary, args.rounds, queue)
            )
            process.start()
            row = queue.get()
            process.join()
            if row is None:
                print(f"{vocabulary:10d} {name:>8s}   not installed")
                continue
            base = base or row
            print(
                f"{vocabulary:10d} {name:>8s} {row['seconds']:9.2f} {row['seconds'] / base['seconds']:8.2f} "
                f"{row['peak'] / 1e6:9.0f} {100 * row['peak'] / base['peak']:8.1f} {row['loss']:12.7f}",
                flush=True,
            )
            rows.append({"vocabulary": vocabulary, "method": name, **row})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
