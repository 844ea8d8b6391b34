"""Streaming a teacher larger than memory: ours against accelerate's disk offload and AirLLM.

    python benchmarks/streaming.py                 # the table (4 GB model, 4096 tokens, 3 repeats)
    python benchmarks/streaming.py curve           # cost as the macro-batch and the number of layers grow (a smaller layer)
    python benchmarks/streaming.py --gigabytes 1 --tokens 1024 --repeats 1        # a quick look
    python benchmarks/streaming.py --work DIR --results runs.jsonl --minutes 8    # in parts: what is in the file is not run again

A synthetic Mixtral (random bf16 weights) is written once. Each measurement is a process of its own, systems alternate, and every system
computes the logits of all positions. The page cache of every file it reads is dropped before each of its passes over the weights, which
emulates a model larger than RAM; for the warm row everything is read into the cache first. On CPU everybody computes in fp32.
Columns: MB physically read per token (/proc/self/io), the same as passes over the checkpoint, extra disk, peak memory of the process,
tokens per second, the share of the time that the same multiplications take as plain fp32 matrix products (measured in the same process
just before and after), and the most that other processes took of the machine's CPU time meanwhile.
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
from dataclasses import dataclass
from pathlib import Path

import torch

EXPERTS, TOP_K, BLOCK, HEAD_DIM = 8, 2, 256, 128


@dataclass(frozen=True)
class Shape:
    """A Mixtral of as many layers as wanted."""

    name: str
    hidden: int
    width: int
    heads: int
    kv: int
    vocab: int

    @property
    def attention(self) -> int:
        """Parameters of the four projections."""
        return 2 * self.hidden * HEAD_DIM * (self.heads + self.kv)

    @property
    def layer_bytes(self) -> int:
        """In bf16."""
        return 2 * (EXPERTS * (3 * self.width + 1) * self.hidden + self.attention + 2 * self.hidden)

    def flops_per_token(self, layers: int) -> float:
        """Multiply-adds of every matrix product (attention scores apart), times two."""
        layer = self.attention + TOP_K * 3 * self.hidden * self.width + EXPERTS * self.hidden
        return 2.0 * (layers * layer + self.vocab * self.hidden)


LARGE = Shape("mixtral", 2048, 7168, 16, 4, 32000)
SMALL = Shape("mixtral-small", 1024, 3584, 8, 2, 8000)


def build(folder: Path, shape: Shape, layers: int, fused: bool) -> None:
    """Write the model, a layer at a time. `fused`: transformers' own names, for systems that know no others."""
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    folder.mkdir(parents=True, exist_ok=True)
    MixtralConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.width, num_hidden_layers=layers,
        num_local_experts=EXPERTS, num_attention_heads=shape.heads, num_key_value_heads=shape.kv, head_dim=HEAD_DIM,
        num_experts_per_tok=TOP_K, max_position_embeddings=4096, architectures=["MixtralForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    random = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 22, generator=random) * 0.02).bfloat16()

    def make(*size: int) -> torch.Tensor:
        n = torch.Size(size).numel()
        shift = int(torch.randint(0, 1 << 20, (1,), generator=random))
        return noise.roll(shift).repeat(-(-n // noise.numel()))[:n].view(size)

    where: dict[str, str] = {}

    def shard(tensors: dict[str, torch.Tensor], number: int) -> None:
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    ones, h, f = torch.ones(shape.hidden, dtype=torch.bfloat16), shape.hidden, shape.width
    ends = {"model.embed_tokens.weight": make(shape.vocab, h), "lm_head.weight": make(shape.vocab, h)}
    shard({**ends, "model.norm.weight": ones}, 1)
    q, kv = shape.heads * HEAD_DIM, shape.kv * HEAD_DIM
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors = {
            p + f"self_attn.{n}_proj.weight": make(*size)
            for n, size in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items()
        }
        tensors |= {p + n: ones.clone() for n in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        gate, moe = make(EXPERTS, h), p + "block_sparse_moe."
        experts = [
            {w: make(*size) for w, size in (("w1", (f, h)), ("w3", (f, h)), ("w2", (h, f)))} for _ in range(EXPERTS)
        ]
        if fused:
            tensors[p + "mlp.gate.weight"] = gate
            tensors[p + "mlp.experts.gate_up_proj"] = torch.stack([torch.cat((e["w1"], e["w3"])) for e in experts])
            tensors[p + "mlp.experts.down_proj"] = torch.stack([e["w2"] for e in experts])
        else:
            tensors[moe + "gate.weight"] = gate
            tensors |= {f"{moe}experts.{n}.{w}.weight": t for n, e in enumerate(experts) for w, t in e.items()}
        shard(tensors, i + 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    os.sync()  # pages not yet written cannot be dropped


def gemm_rate(seconds: float = 2.0) -> float:
    """fp32 multiply-adds a second, times two, of products shaped like an expert's, into memory that is already there."""
    a, b = torch.randn(1024, LARGE.hidden), torch.randn(LARGE.width, LARGE.hidden)
    out = a @ b.T
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, b.T, out=out)
        done += 1
    return done * 2.0 * a.numel() * len(b) / (time.perf_counter() - start)


def drop_cache(*folders: Path) -> None:
    """Give back the page cache of every file in these folders."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def _field(path: str, name: str) -> int:
    return int(next(row for row in Path(path).read_text().splitlines() if row.startswith(name)).split()[1])


def _busy() -> float:
    """Seconds of CPU that the machine has worked, or that its host took from it, since it started."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Measure:
    """Time, physical reads and peak memory of what runs inside, beside the machine's rate just before and after."""

    def __enter__(self) -> "Measure":
        self.rates = [gemm_rate()]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
        self.read, self.start = _field("/proc/self/io", "read_bytes"), time.perf_counter()
        self.own, self.all = time.process_time(), _busy()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.read = _field("/proc/self/io", "read_bytes") - self.read
        self.peak = _field("/proc/self/status", "VmHWM") * 1024
        spent = _busy() - self.all - (time.process_time() - self.own)
        self.others = max(0.0, spent / (self.seconds * (os.cpu_count() or 1)))
        self.rates.append(gemm_rate())

    def result(self, extra: int, check: float) -> dict:
        """What a child prints. `extra`: bytes of disk beside the checkpoint; `check`: a sum over all logits."""
        rate = sum(self.rates) / 2
        return {
            "seconds": self.seconds, "read": self.read, "peak": self.peak, "rate": rate, "others": self.others,
            "extra": extra, "check": check,
        }  # fmt: skip


def ids_of(folder: Path, tokens: int) -> torch.Tensor:
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocab, (tokens // BLOCK, BLOCK), generator=torch.Generator().manual_seed(1))


def touch(logits: torch.Tensor) -> float:
    """A sum that tells whether systems agree, over every position and some of the vocabulary: all of it would take longer than the head."""
    return logits[..., ::97].abs().double().sum().item()


def run_ours(folder: Path, tokens: int, memory: str, cold: bool) -> dict:
    from moe2dense.teacher.load import load_teacher

    teacher = load_teacher(folder, memory=memory, experts="streamed", device="cpu")
    ids, checksum = ids_of(folder, tokens), 0.0
    teacher.plan = type(teacher.plan)(**{**vars(teacher.plan), "macro_batch": tokens})
    if cold:
        drop_cache(folder)
    else:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    with Measure() as m:
        out = teacher.run(ids, logits=False)
        for _, logits in teacher.logits(out.hidden_states):
            checksum += touch(logits)
    return m.result(0, checksum)


def _in_passes(model, tokens: int, micro: int, folder: Path, copies: Path) -> dict:
    """A transformers model over the tokens, `micro` at a time, the cache dropped before each pass."""
    extra, checksum = sum(p.stat().st_size for p in copies.rglob("*") if p.is_file()), 0.0
    with Measure() as m, torch.no_grad():
        for part in ids_of(folder, tokens).split(max(1, micro // BLOCK)):
            drop_cache(folder, copies)
            checksum += touch(model(part, use_cache=False).logits)
    return m.result(extra, checksum)


def run_accelerate(folder: Path, tokens: int, micro: int) -> dict:
    from transformers import AutoModelForCausalLM

    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    device_map: dict = {f"model.layers.{i}": "disk" for i in range(layers)}
    device_map |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with tempfile.TemporaryDirectory(prefix="offload-", dir=folder.parent) as offload:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map, offload_folder=offload, local_files_only=True
        )
        return _in_passes(model, tokens, micro, folder, Path(offload))


def run_airllm(folder: Path, tokens: int, micro: int) -> dict:
    from airllm import AutoModel  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory(prefix="airllm-", dir=folder.parent) as shards:
        model = AutoModel.from_pretrained(
            str(folder), device="cpu", dtype=torch.float32, max_seq_len=BLOCK, layer_shards_saving_path=shards
        )
        return _in_passes(model, tokens, micro, folder, Path(shards))


SYSTEMS = {"ours": run_ours, "accelerate": run_accelerate, "airllm": run_airllm}


@dataclass
class Row:
    """One line of a table: a system on a model."""

    label: str
    system: str
    shape: Shape
    layers: int
    tokens: int
    rest: tuple  # what else the system is told
    fused: bool = False

    def run(self, work: Path) -> dict | str:
        """The result of one process, or the last line of its error."""
        folder = prepared(work, self.shape, self.layers, self.fused)
        job = json.dumps([self.system, str(folder), self.tokens, *self.rest])
        done = subprocess.run([sys.executable, __file__, "child", "--job", job], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        return (done.stderr.strip().splitlines() or ["no message"])[-1]

    def show(self, runs: list[dict | str]) -> None:
        good = [r for r in runs if isinstance(r, dict)]
        if not good:
            print(f"{self.label:<40} {'failed: ' + str(runs[0]) if runs else 'not run yet'}", flush=True)
            return
        size = self.layers * self.shape.layer_bytes + 4 * self.shape.vocab * self.shape.hidden + 2 * self.shape.hidden
        flops = self.tokens * self.shape.flops_per_token(self.layers)
        speed = sorted(self.tokens / r["seconds"] for r in good)
        share = statistics.median(flops / r["rate"] / r["seconds"] for r in good)
        read = statistics.median(r["read"] for r in good)
        print(
            f"{self.label:<40} {read / self.tokens / 1e6:7.2f} {read / size:6.2f} {max(r['extra'] for r in good) / 1e9:7.2f} "
            f"{max(r['peak'] for r in good) / 1e6:8.0f} {statistics.median(speed):8.1f} "
            f"{f'({speed[0]:.1f} to {speed[-1]:.1f})':<18} {share:7.0%} {max(r['others'] for r in good):6.0%} {len(good):4}",
            flush=True,
        )


HEADER = (
    f"{'':<40} {'MB/tok':>7} {'passes':>6} {'extra':>7} {'peak':>8} {'tok/s':>8} {'(min to max)':<18} {'of GEMM':>7} {'others':>6} {'runs':>4}\n"
    f"{'':<40} {'read':>7} {'read':>6} {'GB disk':>7} {'MB':>8} {'median':>8} {'':<18} {'time':>7} {'CPU':>6}"
)


def prepared(work: Path, shape: Shape, layers: int, fused: bool = False) -> Path:
    """The model's folder, written if it is not there."""
    folder = work / f"{shape.name}-{layers}{'-fused' if fused else ''}"
    if not (folder / "model.safetensors.index.json").exists():
        print(f"writing {folder}", file=sys.stderr, flush=True)
        build(folder, shape, layers, fused)
        for path in (Path(__file__).parents[1] / "examples" / "tiny-mixtral").glob("tokenizer*"):
            shutil.copy(path, folder)  # AirLLM does not load without
    return folder


def measure(rows: list[Row], args: argparse.Namespace, work: Path) -> dict[str, list]:
    """Every row's runs, `repeats` of each, alternating; kept in the file of results, where one is given, and read from it."""
    file = Path(args.results) if args.results else None
    found: dict[str, list] = {row.label: [] for row in rows}
    for line in file.read_text().splitlines() if file and file.exists() else []:
        label, result = json.loads(line)
        found.setdefault(label, []).append(result)
    start, longest = time.monotonic(), 0.0
    for repeat in range(args.repeats):
        for row in rows:
            failed = any(isinstance(r, str) for r in found[row.label])
            if failed or len(found[row.label]) > repeat or (args.only and not row.label.startswith(args.only)):
                continue
            if args.minutes and time.monotonic() - start + longest > 60 * args.minutes:
                return found
            began = time.monotonic()
            found[row.label].append(row.run(work))
            longest = max(longest, time.monotonic() - began)
            print(f"  {row.label}: {found[row.label][-1]}", file=sys.stderr, flush=True)
            if file:
                with file.open("a") as out:
                    print(json.dumps([row.label, found[row.label][-1]]), file=out)
    return found


def table(args: argparse.Namespace, work: Path) -> None:
    """Every system on the same model and tokens, alternated."""
    layers = max(1, -(-int(args.gigabytes * 1e9 - 4 * LARGE.vocab * LARGE.hidden) // LARGE.layer_bytes))
    tokens, few = args.tokens, min(args.tokens, args.few)
    same = (LARGE, layers)
    rows = [
        Row(f"moe2dense, memory={args.memory}", "ours", *same, tokens, (args.memory, True)),
        Row(f"accelerate, {BLOCK} tokens a pass", "accelerate", *same, few, (BLOCK,)),
        Row("accelerate, all tokens in one pass", "accelerate", *same, tokens, (tokens,)),
        Row("AirLLM, all tokens, fused layout", "airllm", *same, tokens, (tokens,), True),
        Row("AirLLM, hub layout, one layer", "airllm", LARGE, 1, BLOCK, (BLOCK,)),
        Row("moe2dense, warm cache", "ours", *same, tokens, (args.memory, False)),
    ]
    print(f"Mixtral of {layers} layers, {tokens} tokens in blocks of {BLOCK}, {args.repeats} repeats")
    print(
        f"accelerate at {BLOCK} tokens a pass has no smaller peak to offer, and runs {few} tokens: every pass costs the same"
    )
    found = measure(rows, args, work)
    print(HEADER)
    for row in rows:
        row.show(found[row.label])
    whole = [row for row in rows if row.tokens == tokens and row.layers == layers]
    sums = {r["check"] for row in whole for r in found[row.label] if isinstance(r, dict)}
    if sums:
        spread = (max(sums) - min(sums)) / abs(min(sums))
        print(f"sum of the magnitudes of a share of all positions' logits: systems differ by {spread:.1e} of it")


def curve(args: argparse.Namespace, work: Path) -> None:
    """Tokens per second and bytes per token as the macro-batch and the number of layers grow."""
    middle = args.curve_layers[len(args.curve_layers) // 2]
    by_tokens = [
        Row(f"{middle} layers, {t} tokens", "ours", SMALL, middle, t, (args.memory, True)) for t in args.curve_tokens
    ]
    by_layers = [
        Row(f"{n} layers, {args.tokens} tokens", "ours", SMALL, n, args.tokens, (args.memory, True))
        for n in args.curve_layers
    ]
    found = measure([*by_tokens, *(r for r in by_layers if r.layers != middle)], args, work)
    print(
        "as the macro-batch grows: bytes per token fall as 1 / tokens; speed rises until matrix products fill the time"
    )
    print(HEADER)
    for row in by_tokens:
        row.show(found[row.label])
    print("as the model grows: bytes and time per token grow with the layers, memory does not")
    for row in by_layers:
        row.show(found.get(row.label, []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="table", choices=["table", "curve", "child"])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="at least")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--few", type=int, default=512, help=f"tokens for the row that reads everything every {BLOCK}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", default="600MB")
    parser.add_argument("--curve-tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--curve-layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--work", default="", help="folder for the models, kept; default: a temporary one")
    parser.add_argument("--results", default="", help="file of measurements: those in it are not run again")
    parser.add_argument("--minutes", type=float, default=0, help="start no measurement that would end later than this")
    parser.add_argument("--only", default="", help="run only rows whose label begins like this")
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
