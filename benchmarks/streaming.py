"""Streaming a teacher larger than memory: ours against accelerate's disk offload and AirLLM.

    python benchmarks/streaming.py                 # the table (4 GB model, 4096 tokens, 3 repeats)
    python benchmarks/streaming.py curve           # cost as the macro-batch and the number of layers grow
    python benchmarks/streaming.py --gigabytes 0.5 --tokens 1024 --repeats 1   # a quick look

A synthetic Mixtral (random bf16 weights) is written once. Each measurement is a process of its own, systems alternate, and every system
computes the logits of all positions. The page cache of every file it reads is dropped before each of its passes over the weights, which
emulates a model larger than RAM; the warm row leaves the cache alone. On CPU everybody computes in fp32.
Columns: MB physically read per token (/proc/self/io), extra disk, peak memory of the process, tokens per second, and the share of the
time that the same multiplications take as plain fp32 matrix products, measured in the same process around the pass.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HIDDEN, WIDTH, EXPERTS, TOP_K, VOCAB, BLOCK = 2048, 7168, 8, 2, 32000, 256
HEADS, KV = 16, 4


def build(folder: Path, layers: int, fused: bool = False) -> int:
    """Write the model, one tensor at a time; returns its bytes. `fused`: transformers' own names, for systems that know no others."""
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=layers, num_local_experts=EXPERTS,
        num_attention_heads=HEADS, num_key_value_heads=KV, num_experts_per_tok=TOP_K, max_position_embeddings=4096,
        architectures=["MixtralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 22, generator=random) * 0.02).bfloat16()

    def make(*shape: int) -> torch.Tensor:
        n = 1
        for s in shape:
            n *= s
        shift = int(torch.randint(0, 1 << 20, (1,), generator=random))
        return noise.roll(shift).repeat(-(-n // noise.numel()))[:n].view(shape)

    where, total = {}, 0

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    shard(
        f"model-00001-of-{layers + 1:05d}.safetensors",
        {
            "model.embed_tokens.weight": make(VOCAB, HIDDEN),
            "lm_head.weight": make(VOCAB, HIDDEN),
            "model.norm.weight": ones,
        },
    )
    kv = HIDDEN // HEADS * KV
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors = {p + f"self_attn.{n}_proj.weight": make(HIDDEN if n in "qo" else kv, HIDDEN) for n in "qkvo"}
        tensors |= {p + n: ones.clone() for n in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        if fused:
            tensors[p + "mlp.gate.weight"] = make(EXPERTS, HIDDEN)
            tensors[p + "mlp.experts.gate_up_proj"] = make(EXPERTS, 2 * WIDTH, HIDDEN)
            tensors[p + "mlp.experts.down_proj"] = make(EXPERTS, HIDDEN, WIDTH)
        else:
            moe = p + "block_sparse_moe."
            tensors[moe + "gate.weight"] = make(EXPERTS, HIDDEN)
            for e in range(EXPERTS):
                for w, shape in (("w1", (WIDTH, HIDDEN)), ("w3", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH))):
                    tensors[f"{moe}experts.{e}.{w}.weight"] = make(*shape)
        shard(f"model-{i + 2:05d}-of-{layers + 1:05d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    os.sync()  # pages not yet written cannot be dropped
    return total


def flops_per_token(layers: int) -> float:
    """Multiply-adds of every matrix product (attention scores apart), times two."""
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * (HIDDEN // HEADS * KV)
    return 2.0 * (layers * (attention + TOP_K * 3 * HIDDEN * WIDTH + EXPERTS * HIDDEN) + VOCAB * HIDDEN)


def gemm_rate(seconds: float = 2.0) -> float:
    """fp32 multiply-adds a second, times two, of products shaped like an expert's."""
    a, b = torch.randn(1024, HIDDEN), torch.randn(WIDTH, HIDDEN)
    a @ b.T
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b.T
        done += 1
    return done * 2.0 * 1024 * HIDDEN * WIDTH / (time.perf_counter() - start)


def drop_cache(*folders: Path) -> None:
    """Give back the page cache of every file in these folders."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def bytes_read() -> int:
    """Bytes this process fetched from the storage device."""
    return int(
        next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")).split()[
            1
        ]
    )


class Measure:
    """Time, physical reads and peak memory of what runs inside, beside the machine's rate just before and after."""

    def __enter__(self) -> "Measure":
        self.rates = [gemm_rate()]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
        self.read, self.start = bytes_read(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.read = time.perf_counter() - self.start, bytes_read() - self.read
        status = Path("/proc/self/status").read_text().splitlines()
        self.peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
        self.rates.append(gemm_rate())


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (tokens // BLOCK, BLOCK), generator=torch.Generator().manual_seed(1))


def run_ours(folder: Path, tokens: int, memory: str, cold: bool) -> dict:
    from moe2dense.teacher.load import load_teacher

    teacher = load_teacher(folder, memory=memory, experts="streamed", device="cpu")
    ids, checksum = ids_of(tokens), 0.0
    teacher.plan = type(teacher.plan)(**{**vars(teacher.plan), "macro_batch": tokens})
    if cold:
        drop_cache(folder)
    with Measure() as m:
        out = teacher.run(ids, logits=False)
        head = teacher.head
        for rows in out.hidden_states.flatten(0, 1).split(1024):
            checksum += head.logits(rows).logsumexp(-1).sum().item()
    return {
        "seconds": m.seconds,
        "read": m.read,
        "peak": m.peak,
        "rate": sum(m.rates) / 2,
        "extra": 0,
        "check": checksum,
    }


def run_accelerate(folder: Path, tokens: int, micro: int) -> dict:
    from transformers import AutoModelForCausalLM

    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    device_map: dict = {f"model.layers.{i}": "disk" for i in range(layers)}
    device_map |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offload = Path(tempfile.mkdtemp(prefix="offload-", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map, offload_folder=offload, local_files_only=True
        )
        extra, checksum = sum(p.stat().st_size for p in offload.rglob("*") if p.is_file()), 0.0
        with Measure() as m, torch.no_grad():
            for part in ids_of(tokens).split(max(1, micro // BLOCK)):
                drop_cache(folder, offload)
                checksum += model(part, use_cache=False).logits.logsumexp(-1).sum().item()
        return {
            "seconds": m.seconds,
            "read": m.read,
            "peak": m.peak,
            "rate": sum(m.rates) / 2,
            "extra": extra,
            "check": checksum,
        }
    finally:
        shutil.rmtree(offload, ignore_errors=True)


def run_airllm(folder: Path, tokens: int, micro: int) -> dict:
    from airllm import AutoModel

    shards = Path(tempfile.mkdtemp(prefix="airllm-", dir=folder.parent))
    try:
        model = AutoModel.from_pretrained(
            str(folder), device="cpu", dtype=torch.float32, max_seq_len=BLOCK, layer_shards_saving_path=str(shards)
        )
        extra, checksum = sum(p.stat().st_size for p in shards.rglob("*") if p.is_file()), 0.0
        with Measure() as m, torch.no_grad():
            for part in ids_of(tokens).split(max(1, micro // BLOCK)):
                drop_cache(folder, shards)
                checksum += model(part, use_cache=False).logits.float().logsumexp(-1).sum().item()
        return {
            "seconds": m.seconds,
            "read": m.read,
            "peak": m.peak,
            "rate": sum(m.rates) / 2,
            "extra": extra,
            "check": checksum,
        }
    finally:
        shutil.rmtree(shards, ignore_errors=True)


SYSTEMS = {"ours": run_ours, "accelerate": run_accelerate, "airllm": run_airllm}


def child(system: str, folder: Path, tokens: int, *rest: object) -> dict | str:
    """The result of one process, or the last line of its error."""
    job = json.dumps([system, str(folder), tokens, *rest])
    done = subprocess.run([sys.executable, __file__, "child", "--job", job], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def show(label: str, runs: list[dict | str], tokens: int, layers: int, size: int) -> None:
    good = [r for r in runs if isinstance(r, dict)]
    if not good:
        print(f"{label:<38} failed: {runs[0]}", flush=True)
        return
    speed = sorted(tokens / r["seconds"] for r in good)
    share = statistics.median(tokens * flops_per_token(layers) / r["rate"] / r["seconds"] for r in good)
    read = statistics.median(r["read"] for r in good)
    print(
        f"{label:<38} {read / tokens / 1e6:7.2f} {read / size:6.2f} {max(r['extra'] for r in good) / 1e9:7.2f} "
        f"{max(r['peak'] for r in good) / 1e6:8.0f} {statistics.median(speed):8.1f} ({speed[0]:.1f} to {speed[-1]:.1f}) {share:8.0%}",
        flush=True,
    )


HEADER = (
    f"{'':<38} {'MB/tok':>7} {'passes':>6} {'extra':>7} {'peak':>8} {'tok/s':>8} {'(min to max)':<18} {'of GEMM':>7}\n"
    f"{'':<38} {'read':>7} {'read':>6} {'GB disk':>7} {'MB':>8}"
)


def layers_for(gigabytes: float) -> int:
    per_layer = 2 * (EXPERTS * 3 * HIDDEN * WIDTH + 2.5 * HIDDEN * HIDDEN)
    return max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer + 0.49))


def prepared(work: Path, layers: int, fused: bool = False) -> tuple[Path, int]:
    folder = work / f"mixtral-{layers}{'-fused' if fused else ''}"
    if not (folder / "model.safetensors.index.json").exists():
        print(f"writing {folder}", flush=True)
        build(folder, layers, fused)
    return folder, sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def table(args: argparse.Namespace, work: Path) -> None:
    """Every system on the same model and tokens, alternated."""
    layers = layers_for(args.gigabytes)
    folder, size = prepared(work, layers)
    tokens, small, best = args.tokens, BLOCK, args.tokens
    rows: dict[str, tuple] = {
        f"moe2dense, memory={args.memory}": ("ours", folder, tokens, args.memory, True),
        "moe2dense, warm cache": ("ours", folder, tokens, args.memory, False),
        f"accelerate disk offload, {small} tokens": ("accelerate", folder, min(tokens, args.few), small),
        f"accelerate disk offload, {best} tokens": ("accelerate", folder, tokens, best),
    }
    try:
        import airllm  # noqa: F401

        fused, _ = prepared(work, layers, fused=True)
        tokenizer = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
        for path in tokenizer.glob("tokenizer*"):
            shutil.copy(path, fused)
        rows[f"AirLLM, fused layout, {best} tokens"] = ("airllm", fused, tokens, best)
    except ImportError:
        print("AirLLM is not installed (pip install airllm): no row")
    print(
        f"Mixtral of {size / 1e9:.2f} GB in bf16, {layers} layers, {tokens} tokens in blocks of {BLOCK}, {args.repeats} repeats"
    )
    print(
        f"(accelerate at {small} tokens a pass: {min(tokens, args.few)} tokens, as its cost per token does not depend on their number)"
    )
    print(HEADER)
    found: dict[str, list] = {label: [] for label in rows}
    for _ in range(args.repeats):
        for label, job in rows.items():
            found[label].append(child(*job))
            print(f"  {label}: {found[label][-1]}", file=sys.stderr, flush=True)
    for label, job in rows.items():
        show(label, found[label], job[2], layers, size)
    sums = {
        label: r["check"]
        for label, runs in found.items()
        for r in runs
        if isinstance(r, dict) and rows[label][2] == tokens
    }
    spread = max(sums.values()) - min(sums.values())
    print(f"sum of log-normalisers over all positions: systems differ by {spread / abs(min(sums.values())):.1e} of it")


def curve(args: argparse.Namespace, work: Path) -> None:
    """Tokens per second and bytes per token as the macro-batch and the number of layers grow."""
    print(
        "as the macro-batch grows: bytes per token fall as 1 / tokens; speed rises until matrix products fill the time"
    )
    print(HEADER)
    layers = min(args.curve_layers)
    folder, size = prepared(work, layers)
    for tokens in args.curve_tokens:
        show(
            f"{layers} layers, {tokens} tokens",
            [child("ours", folder, tokens, args.memory, True)],
            tokens,
            layers,
            size,
        )
    print("as the model grows: bytes and time per token grow with the layers, memory does not")
    for layers in args.curve_layers:
        folder, size = prepared(work, layers)
        tokens = args.tokens
        show(
            f"{layers} layers, {tokens} tokens",
            [child("ours", folder, tokens, args.memory, True)],
            tokens,
            layers,
            size,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="table", choices=["table", "curve", "child"])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--few", type=int, default=1024, help="tokens for the row that reads everything again every 256"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", default="600MB")
    parser.add_argument("--curve-tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--curve-layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--work", default="", help="folder for the models, kept; default: a temporary one")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "child":
        system, folder, *rest = json.loads(args.job)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print(json.dumps(SYSTEMS[system](Path(folder), *rest)))
        return
    work = Path(args.work) if args.work else Path(tempfile.mkdtemp(prefix="streaming-"))
    try:
        (table if args.what == "table" else curve)(args, work)
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
