"""What the training loop costs: tokens a second against a hand-written PyTorch loop, and bytes a token of each store.

    python benchmarks/distill.py [--steps 12] [--rounds 5] [--kl 0]

Teacher: examples/tiny-mixtral, resident, asked at every step (online) by both loops; student: Mistral, width 512, random
FFN. The loops take turns and the best round of each counts. `--kl TOKENS` also trains once per store format at equal
tokens and prints the validation KL.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM  # noqa: E402

from moe2dense.config import TrainConfig  # noqa: E402
from moe2dense.data import Blocks, load_blocks  # noqa: E402
from moe2dense.order import step_blocks  # noqa: E402
from moe2dense.schedules import learning_rate  # noqa: E402
from moe2dense.targets import ResidentTargets, hidden_targets, open_targets, write_targets  # noqa: E402
from moe2dense.targets.formats import FORMATS  # noqa: E402
from moe2dense.training import distill  # noqa: E402

PER_STEP = 8


def make_student(teacher):
    """The teacher's attention, embeddings and head, with random dense FFNs."""
    kept = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    config = MistralConfig(
        **{k: getattr(teacher.config, k) for k in kept}, intermediate_size=512, max_position_embeddings=256,
        rope_parameters=teacher.config.rope_parameters, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    student = MistralForCausalLM(config)
    student.load_state_dict({k: v for k, v in teacher.state_dict().items() if ".mlp." not in k}, strict=False)
    return student


def bare_loop(teacher, blocks: Blocks, steps: int, labels_only: bool = False) -> float:
    """What one would write by hand: full logits and torch's own losses. Returns seconds."""
    student = make_student(teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start = time.perf_counter()
    for step in range(steps):
        ids = blocks.input_ids[step_blocks(len(blocks), PER_STEP, step, 0)]
        logits = student(ids, use_cache=False).logits.flatten(0, 1)
        if labels_only:
            loss = F.cross_entropy(logits.view(*ids.shape, -1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        else:
            with torch.no_grad():
                answers = teacher(ids, use_cache=False).logits.flatten(0, 1)
            loss = F.kl_div(logits.log_softmax(-1), answers.log_softmax(-1), reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3, 0.03)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return time.perf_counter() - start


def our_loop(teacher, blocks: Blocks, targets, alpha: float = 0.0) -> float:
    config = TrainConfig(batch=PER_STEP * 256, micro_batch=PER_STEP, alpha=alpha, save_every=10**9, eval_every=10**9)
    student = make_student(teacher)
    return sum(
        256 * PER_STEP / r["tokens_per_second"]
        for r in distill(student, data=blocks, targets=targets, config=config).history
    )


def speed(teacher, blocks: Blocks, steps: int, rounds: int) -> None:
    blocks = blocks[: steps * PER_STEP]
    memory = hidden_targets(teacher, blocks)
    with tempfile.TemporaryDirectory() as folder:
        stored = open_targets(write_targets(teacher, blocks, folder), blocks)
        runs = {
            "online, bare PyTorch loop": lambda: bare_loop(teacher, blocks, steps),
            "online, distill()": lambda: our_loop(teacher, blocks, ResidentTargets(teacher, blocks)),
            "hard labels alone, bare PyTorch loop": lambda: bare_loop(teacher, blocks, steps, labels_only=True),
            "hidden states in memory, distill()": lambda: our_loop(teacher, blocks, memory),
            "hidden states on disk, distill()": lambda: our_loop(teacher, blocks, stored),
        }
        seconds = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run())
    print(f"\n{steps} steps of {PER_STEP} x 256 tokens, best of {rounds}\n")
    for name, found in seconds.items():
        print(f"{name:40s} {steps * PER_STEP * 256 / min(found):8.0f} tokens/s")
    best = {name: min(found) for name, found in seconds.items()}
    print(
        f"\ndistill() online / bare loop  {best['online, bare PyTorch loop'] / best['online, distill()']:.3f}  (goal >= 0.97)"
    )
    ratio = best["hard labels alone, bare PyTorch loop"] / best["hidden states on disk, distill()"]
    print(f"from the store / hard labels  {ratio:.3f}  (goal >= 0.9)")


def formats(teacher, blocks: Blocks, valid: Blocks, tokens: int) -> None:
    """Bytes a token, and the validation KL after training on each format."""
    held = hidden_targets(teacher, valid)
    print(f"\n{'targets':20s} {'bytes/token':>12s} {'KL after ' + str(tokens) + ' tokens':>26s}")
    small = blocks[: max(16, tokens // 256)]
    for format in (*FORMATS, "hard labels"):
        with tempfile.TemporaryDirectory() as folder:
            size, store, alpha = 0.0, None, 1.0
            used = small[:16] if format == "full" and not tokens else small
            if format != "hard labels":
                store, alpha = open_targets(write_targets(teacher, used, folder, format), used), 0.0
                size = sum(p.stat().st_size for p in Path(folder).glob("shard-*")) / used.tokens
            kl = float("nan")
            if tokens:
                student = make_student(teacher)
                config = TrainConfig(alpha=alpha, eval_every=10**9)
                run = distill(student, data=used, targets=store, valid=valid, valid_targets=held, config=config)
                kl = run.history[-1]["valid_kl"]
            print(f"{format:20s} {size:12.1f} {kl:26.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kl", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--data", default=str(ROOT / "examples/text"))
    args = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(ROOT / "examples/tiny-mixtral", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-mixtral")
    blocks = load_blocks(args.data, tokenizer, 256, tokens=max(args.kl, args.steps * PER_STEP * 256))
    valid = load_blocks(args.data, tokenizer, 256, "valid", tokens=96 * 256)
    speed(teacher, blocks, args.steps, args.rounds)
    formats(teacher, blocks, valid, args.kl)


if __name__ == "__main__":
    main()
