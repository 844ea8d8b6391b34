"""Carve a dense language model into a Mixture of Experts and heal it by distillation from the original.

    python examples/carve_moe.py SmolLM2.gguf out/carved --data train.jsonl.gz --valid valid.jsonl.gz --top-k 8

Two kinds. `carved`: the neurons of each feed-forward network (FFN) are split into experts of equal size by clustering their
activation patterns, and a linear router is fitted to the order in which the experts matter for each token. Nothing is added:
with all experts chosen the model is the dense one. `upcycled`: each expert is a copy of the neurons that are most active on
one domain of the text, a part of them drawn anew (Drop-Upcycling, 2502.19261), and the router starts from the domains.

Healing first fits each block to the dense FFN on the dense model's own hidden states: the output projections in closed form,
then all weights by gradient. Then the whole model learns the dense model's distribution (forward KL). Errors of the first
stage are relative to each token's residual stream, which is what the next layer's norm sees: a few tokens (the first of a
text, delimiters) carry activations hundreds of times the median, and one of them would dominate any plain squared error.
OUT holds a checkpoint in bfloat16 that transformers loads at any time, log.json, and state.pt (for --resume) until the end.
"""

import argparse
import copy
import gzip
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from carving import RouterWatch, balance_loss, carve_block, empty_moe, fit_block, moe_blocks, schedule, walk
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# N blocks of text, S tokens a block, T tokens


def passages(path: Path) -> list[tuple[str, str]]:
    """Read (domain, text) pairs of a .jsonl or .jsonl.gz file, or of a .txt file, which is cut every 8000 characters."""
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        return [(path.stem, text[i : i + 8000]) for i in range(0, len(text), 8000)]
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [(row.get("domain", path.stem), row["text"]) for row in map(json.loads, lines)]


def read_blocks(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, block: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return up to `count` blocks of token ids [N, S] and the index of each block's domain [N], in random order.

    At most two blocks come from a passage, so that few blocks still hold much variety.
    """
    rows = [row for path in paths for row in passages(path)]
    names = sorted({domain for domain, _ in rows})
    blocks, domains = [], []
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        ids = tokenizer(rows[i][1], add_special_tokens=False)["input_ids"]
        for start in range(0, min(len(ids) - block + 1, 2 * block), block):
            blocks.append(ids[start : start + block])
            domains.append(names.index(rows[i][0]))
        if len(blocks) >= count:
            break
    if not blocks:
        raise SystemExit(f"no passage of --data/--valid is {block} tokens long; give longer text or a smaller --block")
    return torch.tensor(blocks[:count]), torch.tensor(domains[:count])


def divergence(dense: PreTrainedModel, moe: PreTrainedModel, ids: Tensor, bf16: bool) -> tuple[Tensor, Tensor]:
    """Return the KL divergence of the MoE from the dense model and the MoE's next-token loss: means over tokens, in nats."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            target = F.log_softmax(dense(ids, use_cache=False).logits.float(), -1)
        predicted = F.log_softmax(moe(ids, use_cache=False).logits.float(), -1)
    kl = F.kl_div(predicted, target, log_target=True, reduction="none").sum(-1).mean()
    return kl, F.nll_loss(predicted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def measure(dense: PreTrainedModel, moe: PreTrainedModel, ids: Tensor, domain: Tensor, bf16: bool) -> dict:
    """Return NLL and KL in nats on held-out text and, for each layer, three numbers of its routing.

    entropy: of the router's distribution, mean over tokens, in nats; effective_experts: exp(entropy of the load), E when even;
    domain_bits: mutual information between a token's domain and its chosen expert, 0 when experts do not specialise.
    """
    watch, results, seen = RouterWatch(moe_blocks(moe)), [], []
    for part in ids.split(4):
        results.append([float(v) * len(part) for v in divergence(dense, moe, part, bf16)])
        seen.append(watch.take())
    watch.close()
    layers: dict[str, list[float]] = {"entropy": [], "effective_experts": [], "domain_bits": []}
    for per_layer in zip(*seen, strict=True):
        logits, index = (torch.cat(parts) for parts in zip(*per_layer, strict=True))
        counts = torch.zeros(int(domain.max()) + 1, logits.shape[-1])
        counts.index_add_(0, domain.repeat_interleave(ids.shape[1]), F.one_hot(index, logits.shape[-1]).sum(1).float())
        joint = counts / counts.sum()
        load, text = joint.sum(0), joint.sum(1)
        layers["entropy"].append(float(torch.special.entr(logits.float().softmax(-1)).sum(-1).mean()))
        layers["effective_experts"].append(float(torch.special.entr(load).sum().exp()))
        nats = torch.special.entr(load).sum() + torch.special.entr(text).sum() - torch.special.entr(joint).sum()
        layers["domain_bits"].append(float(nats) / math.log(2))
    kl, nll = (sum(column) / len(ids) for column in zip(*results, strict=True))
    rounded = {name: [round(value, 3) for value in values] for name, values in layers.items() if values}
    return {"nll": round(nll, 4), "kl": round(kl, 4), "layers": rounded}


class Run:
    """A run's folder: the checkpoint that transformers loads, log.json and state.pt, each replaced atomically."""

    def __init__(self, args: argparse.Namespace, moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.out, self.moe, self.tokenizer = args.out, moe, tokenizer
        self.every, self.saved = 60 * args.save_minutes, time.monotonic()
        self.settings = {k: str(v) for k, v in vars(args).items() if k not in ("resume", "out", "save_minutes")}
        self.state: dict = {"settings": self.settings, "carved": False, "layer": 0, "step": 0, "log": [], "seconds": 0}
        self.out.mkdir(parents=True, exist_ok=True)
        if args.resume and (self.out / "state.pt").exists():
            self.state = torch.load(self.out / "state.pt", weights_only=True)
            changed = [k for k, v in self.settings.items() if self.state["settings"].get(k) != v]
            if changed:
                raise SystemExit(
                    f"--resume: {', '.join(changed)} differ from the interrupted run; give the same or a new OUT"
                )
            moe.load_state_dict(self.state.pop("model"))
        self.start = time.monotonic() - self.state["seconds"]

    def note(self, **record: Any) -> None:
        """Add a record to log.json and print its short form."""
        record["seconds"] = round(time.monotonic() - self.start)
        self.state["log"].append(record)
        write_atomically(self.out / "log.json", lambda path: path.write_text(json.dumps(self.state["log"], indent=1)))
        short = {k: v for k, v in record.items() if k != "layers"}
        for name, values in record.get("layers", {}).items():
            short[name] = f"{min(values):.2f} to {max(values):.2f}"
        print("  ".join(f"{k} {v}" for k, v in short.items()), flush=True)

    def save(self, optimizer: torch.optim.Optimizer | None = None, *, now: bool = False) -> None:
        """Save state.pt and the checkpoint if it is time."""
        if not now and time.monotonic() - self.saved < self.every:
            return
        self.state |= {"seconds": time.monotonic() - self.start, "optimizer": optimizer and optimizer.state_dict()}
        state = self.state | {"model": self.moe.state_dict()}
        write_atomically(self.out / "state.pt", lambda path: torch.save(state, path))
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".saving") as folder:
            copy.deepcopy(self.moe).to(torch.bfloat16).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            for path in Path(folder).iterdir():
                os.replace(path, self.out / path.name)
        self.saved = time.monotonic()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then rename it, so that a killed run leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def heal(
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    ids: Tensor,
    valid: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    run: Run,
) -> None:
    """Distil the dense model into the MoE's layers end to end: forward KL plus the balancing loss, mean over layers."""
    trained = [p for name, p in moe.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    if run.state.get("optimizer"):
        optimizer.load_state_dict(run.state["optimizer"])
    watch = RouterWatch(moe_blocks(moe))
    steps = len(ids) // args.batch
    while (step := run.state["step"]) < steps:
        optimizer.param_groups[0]["lr"] = args.rate * schedule(step, steps)
        total = 0.0
        for part in ids[step * args.batch : (step + 1) * args.batch].split(2):
            kl, nll = divergence(dense, moe, part, args.bf16)
            uneven = torch.stack([balance_loss(*layer) for layer in watch.take()]).mean()
            loss = (1 - args.text_loss) * kl + args.text_loss * nll + args.balance * uneven
            (loss * len(part) / args.batch).backward()
            total += kl.item() * len(part) / args.batch
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.state["step"] = step + 1
        run.note(stage="heal", step=f"{step + 1}/{steps}", train_kl=round(total, 4), balance=round(uneven.item(), 3))
        if (step + 1) % args.measure_every == 0 and step + 1 < steps:
            run.note(stage="heal", step=f"{step + 1}/{steps}", **measure(dense, moe, *valid, args.bf16))
            watch.take()
        run.save(optimizer)
    watch.close()


OPTIONS = [  # name, default (gives the type), help
    ("--experts", 16, "routed experts in a layer"),
    ("--top-k", 8, "routed experts chosen for a token"),
    ("--redraw", 0.25, "upcycled: part of each expert's neurons drawn anew"),
    ("--router-spread", 0.1, "standard deviation of the first router's logits"),
    ("--fit-tokens", 32768, "tokens for the layer-wise fit; a quarter of them for carving"),
    ("--fit-passes", 1, "passes over them by gradient; 0 refits the output projections alone"),
    ("--fit-rate", 1e-3, "learning rate of the layer-wise fit"),
    ("--tokens", 131072, "tokens for end-to-end healing; 0 leaves it out"),
    ("--rate", 5e-4, "learning rate of end-to-end healing"),
    ("--text-loss", 0.0, "weight of the next-token loss beside the KL divergence, 0 to 1"),
    ("--balance", 0.01, "weight of the load-balancing loss"),
    ("--batch", 8, "blocks in a step of end-to-end healing"),
    ("--block", 256, "tokens in a block of text"),
    ("--valid-blocks", 28, "held-out blocks that NLL, KL and routing are measured on"),
    ("--measure-every", 20, "steps between measurements while healing"),
    ("--save-minutes", 10.0, "minutes between saved states"),
    ("--seed", 0, "seed of the text's order and of everything drawn"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; --width and --shared stay None where they are left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dense", type=Path, help="dense checkpoint with gated FFNs: a folder, or a GGUF file that transformers loads")
    add("out", type=Path, help="folder for the MoE checkpoint, log.json and state.pt")
    text = '.jsonl or .jsonl.gz of {"text", "domain"}, or .txt (its name is the domain)'
    add("--data", type=Path, nargs="+", required=True, metavar="FILE", help=f"text to heal on: {text}")
    add("--valid", type=Path, nargs="+", required=True, metavar="FILE", help="held-out text, same formats")
    add("--family", choices=["mixtral", "qwen2_moe"], default="mixtral", help="layout; qwen2_moe has a shared expert")
    add("--kind", choices=["carved", "upcycled"], default="carved", help="split the neurons, or copy and redraw a part")
    add("--width", type=int, help="upcycled: neurons in a routed expert (half the FFN); carved: follows from --experts")
    add(
        "--shared",
        type=int,
        help="qwen2_moe: neurons in the shared expert, the most active ones (a quarter of the FFN)",
    )
    for name, default, explanation in OPTIONS:
        add(name, type=type(default), default=default, metavar="N", help=f"{explanation} ({default})")
    add("--bf16", action="store_true", help="multiply matrices in bfloat16: faster on CPUs with AVX512-BF16 or AMX")
    add("--resume", action="store_true", help="go on from OUT/state.pt, with the same options")
    return parser.parse_args(argv)


def derive_sizes(args: argparse.Namespace, ffn: int) -> None:
    """Fill in --width and --shared from the dense FFN's width; raise SystemExit where sizes do not fit."""
    if args.family == "mixtral" and args.shared:
        raise SystemExit("--shared: mixtral has no shared expert; use --family qwen2_moe")
    if args.shared is None:
        args.shared = ffn // 4 if args.family == "qwen2_moe" else 0
    if args.kind == "carved":
        args.width = (ffn - args.shared) // args.experts
        if args.width * args.experts + args.shared != ffn:
            raise SystemExit(
                f"--experts {args.experts} does not divide the {ffn - args.shared} neurons that are not shared"
            )
    args.width = args.width or ffn // 2
    if args.top_k > args.experts or args.width + args.shared > ffn:
        raise SystemExit(
            "--top-k is at most --experts, and an expert and the shared one together at most the dense FFN"
        )


def main(argv: list[str] | None = None) -> None:
    """Carve, fit layer by layer, heal end to end; say what each stage brought."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    source = {"gguf_file": args.dense.name} if args.dense.suffix == ".gguf" else {}
    folder = args.dense.parent if source else args.dense
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source).eval().requires_grad_(False)
    derive_sizes(args, dense.config.intermediate_size)
    moe = empty_moe(dense, args).eval()  # no dropout: gradients do not need train mode
    run = Run(args, moe, tokenizer)
    fit_blocks = args.fit_tokens // args.block
    ids, domain = read_blocks(args.data, tokenizer, args.block, fit_blocks + args.tokens // args.block, args.seed)
    fit_ids, heal_ids = ids[:fit_blocks], ids[fit_blocks:]
    valid = read_blocks(args.valid, tokenizer, args.block, args.valid_blocks, args.seed)
    state, blocks = run.state, moe_blocks(moe)
    if not state["carved"]:
        run.note(stage="dense", **measure(dense, dense, *valid, args.bf16))
        carve_ids = fit_ids[: -(-fit_blocks // 4)]  # a quarter of the text is enough to tell neurons apart
        tokens_domain = domain[: len(carve_ids)].repeat_interleave(args.block)
        for layer, (ffn, x, _, weight) in enumerate(walk(dense, carve_ids, args)):
            carve_block(blocks[layer], ffn, x, weight, tokens_domain, args, layer)
        run.note(stage="carved", **measure(dense, moe, *valid, args.bf16))
        state["carved"] = True
        run.save()
    if state["layer"] < len(blocks):
        for layer, (_, x, y, weight) in enumerate(walk(dense, fit_ids, args)):
            if layer >= state["layer"]:
                errors = fit_block(blocks[layer], x, y, weight, args, layer)
                start, refitted, end = (round(e, 3) for e in errors)
                run.note(stage="fit", layer=layer, error_carved=start, error_refitted=refitted, error_fitted=end)
                state["layer"] = layer + 1
                run.save()
        run.note(stage="fitted", **measure(dense, moe, *valid, args.bf16))
        run.save(now=True)
    heal(dense, moe, heal_ids, valid, args, run)
    run.note(stage="healed", **measure(dense, moe, *valid, args.bf16))
    run.save(now=True)
    (args.out / "state.pt").unlink()


if __name__ == "__main__":
    main()
