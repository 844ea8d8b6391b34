"""Sound inputs of every kind for benchmarks/faults.py, and the ways in which they are damaged.

Mutations come from a plain seeded generator: the same generator damages the same file in the same way.
"""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN = """
[data]
eval_blocks = 4
block = 32
[build]
min_tokens = 128
local_steps = 2
layer_steps = 2
heal_epochs = 1.0
gram_tokens = 128
[train]
tokens = 512
batch = 64
save_every = 2
eval_every = 2
[export]
dtype = "float32"
"""


def make_tokenizer(folder: Path) -> None:
    """Save a small byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(passages(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    fast.save_pretrained(folder)


def passages(count: int = 60) -> list[str]:
    """Return seeded sentences of a small vocabulary."""
    rng = random.Random(7)
    words = [
        "the",
        "sea",
        "was",
        "calm",
        "and",
        "a",
        "captain",
        "saw",
        "seven",
        "ships",
        "sail",
        "over",
        "cold",
        "grey",
        "water",
        "to",
        "find",
        "gold",
    ]
    return [" ".join(rng.choice(words) for _ in range(40)) + "." for _ in range(count)]


def make_inputs(folder: Path) -> None:
    """Write one sound input of every kind into `folder`: teacher, texts, settings, card, student, targets and a run."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=400, max_position_embeddings=64, rope_theta=777.0, rms_norm_eps=3e-6,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "teacher", max_shard_size="60KB")
    make_tokenizer(folder / "teacher")
    texts = folder / "text"
    texts.mkdir()
    rows = [{"text": t, "domain": f"d{i % 3}"} for i, t in enumerate(passages())]
    for split in ("train", "valid"):
        (texts / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    chats = [
        {"messages": [{"role": "user", "content": t[:60]}, {"role": "assistant", "content": t[60:]}]}
        for t in passages()
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chats))
    (folder / "data.txt").write_text("\n\n".join(passages()))
    (folder / "data.csv").write_text("text,domain\n" + "".join(f"{r['text']},{r['domain']}\n" for r in rows))
    (folder / "data.json").write_text(json.dumps({"data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    (folder / "run.toml").write_text(RUN)
    shutil.copy(ROOT / "teachers" / "mixtral.toml", folder / "card.toml")


@dataclass(frozen=True)
class Kind:
    """One kind of input: what is copied for a try, the files of it that are damaged, and the commands that read it."""

    copied: str
    files: str  # a pattern within what is copied; "" where it is itself the file
    commands: tuple[str, ...]


_SMALL = "--block 32 --tokens 256"
_EVAL = f"eval {{0}}/done/model --teacher {{0}}/teacher --data {{0}}/text --out {{0}}/out {_SMALL}"
_INSPECT = f"inspect {{0}}/teacher --data {{0}}/text {_SMALL}"
_CONVERT = "convert {0}/teacher --to 75% --tokens 512 --config {0}/run.toml --no-control --out {0}/out"
_DISTILL = "distill {0}/done/model --targets {0}/targets --data {0}/text --block 32 --tokens 512 --out {0}/out --config {0}/run.toml"
_PLAN = "plan {0}/teacher --to 75% --data {0}/text --speed 1t --disk-speed 1GB"
KINDS: dict[str, Kind] = {
    "config.json": Kind("teacher", "config.json", (_PLAN, _INSPECT, f"{_CONVERT} --data {{0}}/text --dry-run")),
    "index": Kind("teacher", "model.safetensors.index.json", (_PLAN, _INSPECT)),
    "safetensors": Kind("teacher", "*.safetensors", (_PLAN, _INSPECT)),
    "tokenizer": Kind("teacher", "tokenizer*.json", (_INSPECT, f"{_CONVERT} --data {{0}}/text --dry-run")),
    "chat template": Kind("teacher", "chat_template.jinja", (f"{_CONVERT} --data {{0}}/chat.jsonl --dry-run",)),
    "chats": Kind("chat.jsonl", "", (f"{_CONVERT} --data {{0}}/chat.jsonl --dry-run", f"inspect {{0}}/teacher --data {{0}}/chat.jsonl {_SMALL}")),
    "jsonl": Kind("text", "*.jsonl", (_INSPECT, f"{_CONVERT} --data {{0}}/text --dry-run", _EVAL)),
    "json": Kind("data.json", "", (f"{_CONVERT} --data {{0}}/data.json --dry-run",)),
    "parquet": Kind("data.parquet", "", (f"inspect {{0}}/teacher --data {{0}}/data.parquet {_SMALL}",)),
    "txt": Kind("data.txt", "", (f"inspect {{0}}/teacher --data {{0}}/data.txt {_SMALL}",)),
    "csv": Kind("data.csv", "", (f"inspect {{0}}/teacher --data {{0}}/data.csv {_SMALL}",)),
    "settings": Kind("run.toml", "", (f"{_PLAN} --config {{0}}/run.toml", f"{_CONVERT} --data {{0}}/text --dry-run", _DISTILL)),
    "teacher card": Kind("card.toml", "", (f"{_PLAN} --teacher-card {{0}}/card.toml", f"{_INSPECT} --teacher-card {{0}}/card.toml")),
    "report.json": Kind("done", "report.json", ("report {0}/done", "inspect {0}/done", "report {0}/done {0}/done", "export {0}/done --out {0}/out")),
    "student": Kind("done", "model/*.json", (_EVAL, _DISTILL, "export {0}/done/model --out {0}/out")),
    "student weights": Kind("done", "model/*.safetensors", (_EVAL, "export {0}/done/model --out {0}/out")),
    "run folder": Kind("done", "*.json", ("convert --out {0}/done --resume",)),
    "run settings": Kind("done", "moe2dense.toml", ("convert --out {0}/done --resume",)),
    "built student": Kind("done", "build/student/*.json", ("convert --out {0}/done --resume",)),
    "targets": Kind("targets", "*.json", (_DISTILL,)),
    "target shards": Kind("targets", "*[!.json]", (_DISTILL,)),
}  # fmt: skip


# --- mutations

_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x", "0", "../../etc/passwd",
    "\x00", "\ud83d", "é" * 50, "/", [], [None], [[]], ["x"] * 3, [1, 2], {}, {"x": 1}, {"a": {"b": []}},
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of every entry within a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in entries for p in ((*path, key), *_places(inner, (*path, key)))]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with up to three entries replaced, removed, renamed or doubled."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places or rng.random() < 0.02:
            return json.dumps(rng.choice(_VALUES)).encode()
        depth = rng.randint(1, max(map(len, places)))  # shallow entries are few and matter most
        *path, key = rng.choice([p for p in places if len(p) <= depth])
        parent = value
        for step in path:
            parent = parent[step]
        action = rng.choice(("set", "set", "set", "remove", "rename", "copy", "wrap"))
        if action == "remove":
            del parent[key]
        elif action == "rename" and isinstance(parent, dict):
            parent[rng.choice(("", "x", str(key) + "s", str(key).upper()))] = parent.pop(key)
        elif action == "copy":
            *source, last = rng.choice(places)
            with contextlib.suppress(LookupError, TypeError):
                inner = value
                for step in source:
                    inner = inner[step]
                parent[key] = json.loads(json.dumps(inner[last]))
        elif action == "wrap":
            parent[key] = [parent[key]]
        else:
            parent[key] = rng.choice(_VALUES)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes cut, overwritten, doubled, filled or nested."""
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
    noise = rng.choice((b"\x00", b"\xff", b"\n", b'"', b"{", b"]", b"=", b",", b"9", rng.randbytes(1))) * length
    return rng.choice(
        (
            lambda: data[:place],
            lambda: data[:place] + noise + data[place + length :],
            lambda: data[:place] + noise + data[place:],
            lambda: data[:place] + data[place + length :],
            lambda: data[:place] + rng.randbytes(length) + data[place + length :],
            lambda: data + data,
            lambda: b"",
            lambda: b"\xef\xbb\xbf" + data,
            lambda: b"[" * 100_000,
            lambda: b"\x00" * len(data),
            lambda: data.replace(b"\n", b"\r\n"),
        )
    )()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with a changed header, under a length that fits it."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_toml(data: bytes, rng: random.Random) -> bytes:
    """Return TOML with one line's value replaced, or a line removed or doubled."""
    lines = data.decode().splitlines()
    numbers = [i for i, line in enumerate(lines) if "=" in line] or list(range(len(lines)))
    if not numbers:
        return data
    i = rng.choice(numbers)
    values = (
        "-1",
        "0",
        "1e400",
        "nan",
        '""',
        '"x"',
        "[]",
        "[[1]]",
        "{}",
        "true",
        "1979-05-27",
        "99999999999999999999",
        '"\\u0000"',
        "'a+b'",
    )
    replaced = f"{lines[i].split('=')[0]}= {rng.choice(values)}"
    lines[i : i + 1] = rng.choice(([], [lines[i], lines[i]], [replaced], [replaced], [replaced], [replaced]))
    return "\n".join(lines).encode()


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Return JSON lines of which some are changed, or all of them in one way."""
    lines = data.splitlines()
    share, seed = rng.choice((0.02, 0.5, 1.0)), rng.random()
    return b"\n".join(
        mutate_json(line, random.Random(seed) if share == 1 else rng) if rng.random() < share else line
        for line in lines
    )


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    """Return a chat template with a statement that fails, runs long, or reaches for Python."""
    statement = rng.choice(
        ("{{ ().__class__.__mro__[1].__subclasses__() }}", "{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}",
         "{{ raise_exception('no') }}", "{{ undefined.x.y }}", "{% include '/etc/passwd' %}", "{{ messages | tojson }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
         "{{ messages.append(1) }}", "{{ 2 ** 2 ** 30 }}", "{% if %}", "{{ strftime_now('%') }}", "{% set messages = 3 %}", "{{ cycler.__init__.__globals__ }}")
    )  # fmt: skip
    place = rng.choice((0, data.find(b"{% endfor"), len(data)))
    return data[:place] + statement.encode() + data[place:]


_MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json, ".safetensors": mutate_safetensors, ".toml": mutate_toml, ".jsonl": mutate_lines, ".jinja": mutate_template,
}  # fmt: skip


def damage(path: Path, rng: random.Random) -> str:
    """Damage one file; return how, in words."""
    chance, data = rng.random(), path.read_bytes()
    if chance < 0.02:
        path.unlink()
        return "removed"
    if chance < 0.04:
        path.unlink()
        path.mkdir()
        return "a folder in its place"
    mutate = _MUTATORS.get(path.suffix)
    if mutate is None or chance > 0.75:
        path.write_bytes(mutate_bytes(data, rng))
        return "bytes"
    path.write_bytes(mutate(data, rng))
    return "structure"
