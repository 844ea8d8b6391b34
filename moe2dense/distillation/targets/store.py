"""Targets on disk: written once by streaming the teacher, read without it.

store.json            format, teacher, sizes, checksum of every shard; a shard counts once it is listed here
keys.txt              the content hash of every block, in order
head.safetensors      the teacher's head (hidden only)
shard-0000000.safetensors ...   named by its first block

Several processes may write one store: each streams every WORLD-th part of the text and lists its shards under a lock.
"""

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import process
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.formats import (
    FORMATS,
    WRITERS,
    Options,
    read_block,
    read_features,
    to_rows,
    write_features,
)
from moe2dense.distillation.targets.memory import HiddenTargets, Progress, hidden_targets
from moe2dense.distillation.targets.record import check_token_weights
from moe2dense.errors import UserError
from moe2dense.losses.teacher_rows import HiddenRows, TeacherRows
from moe2dense.modeling.head import Head, model_head
from moe2dense.modeling.hooks import feature_name

# N blocks, S block length, H hidden, V vocabulary

VERSION = 2
SHARD_BYTES = 256 * 2**20
_RESIDENT_BLOCKS = 64  # that a teacher held in memory answers at a time


def fingerprint(teacher: Any) -> str:
    """What tells a teacher from another: its configuration and its head's numbers."""
    config = teacher.config.to_dict()
    shape = {
        k: v for k, v in sorted(config.items()) if not k.startswith("_") and k not in ("transformers_version", "dtype")
    }
    weight = _head(teacher).weight
    rows = weight[:: max(1, len(weight) // 256)].detach().float().cpu().contiguous()
    return xxhash.xxh3_128_hexdigest(json.dumps(shape, default=str).encode() + rows.numpy().tobytes())


@torch.no_grad()
def write_targets(
    teacher: Any,
    blocks: Blocks,
    folder: str | Path,
    format: str = "hidden",
    *,
    temperature: float = 1.0,
    k: int = 32,
    draws: int = 50,
    seed: int = 0,
    features: Sequence[str | int] = (),
    routing: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Store the teacher's distributions at every position of `blocks`; an unfinished store is continued at its next shard.

    teacher: a Teacher, streamed in as few passes as its memory budget allows, or a resident transformers model. format:
    hidden, sampled (`draws` at `temperature`), topk (`k` at `temperature`) or full; features: what of some layers rides
    along with hidden targets, in 8 bits, by name or layer number; routing: names of token weights to keep. Under torchrun
    every process writes its share. Raises UserError for what cannot be stored, a folder that holds other targets, or a full disk.
    """
    head, names = _head(teacher), tuple(feature_name(f) for f in features)
    _check(format, temperature, k, draws, names)
    for name in routing:
        check_token_weights(name)
    options = Options(
        format, temperature, min(k, len(head.weight)), draws, seed=seed, features=names, routing=tuple(routing)
    )
    rank, world = process()
    about = _begin(Path(folder), teacher, blocks.keys(), blocks, options, world)
    for start in range(rank * about["part"], len(blocks), world * about["part"]):
        _write_part(Path(folder), teacher, blocks, start, min(start + about["part"], len(blocks)), options, progress)
    if world > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return Path(folder)


def _check(format: str, temperature: float, k: int, draws: int, features: Sequence[str]) -> None:
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}; found {format!r}")
    if not 1 <= draws <= 255:
        raise UserError(f"draws must lie between 1 and 255; found {draws}")
    if k < 1:
        raise UserError(f"k must be at least 1; found {k}")
    if temperature <= 0:
        raise UserError(f"temperature must be above 0; found {temperature:g}")
    if features and format != "hidden":
        raise UserError(f"features ride along with hidden targets only; found format {format!r}")


def _write_part(
    folder: Path, teacher: Any, blocks: Blocks, start: int, stop: int, options: Options, progress: Progress | None
) -> None:
    """Stream the blocks [start, stop) that are not listed yet, and write their shards."""
    done = max([s["to"] for s in _manifest(folder)["shards"] if start <= s["from"] < stop], default=start)
    if done >= stop:
        return
    answers = hidden_targets(teacher, blocks[done:stop], features=options.features, routing=options.routing)
    for piece in _shards(answers, options):
        tensors = WRITERS[options.format](piece.hidden, piece.head, options, done) | write_features(piece.features)
        tensors |= {f"routing-{n}": v.half() for n, v in piece.routing.items()}
        data = save({n: t.contiguous() for n, t in tensors.items()})
        name = f"shard-{done:07d}.safetensors"
        atomic_write(folder / name, data)
        row = {"file": name, "from": done, "to": done + len(piece), "xxh3": xxhash.xxh3_64_hexdigest(data)}
        done += len(piece)
        written = _list(folder, row)
        if progress:
            progress("targets", written, len(blocks), tokens=written * blocks.input_ids.shape[1])


def _list(folder: Path, row: dict[str, Any]) -> int:
    """Enter a shard that is whole; returns how many blocks are."""
    with FileLock(folder / ".lock"):
        about = _manifest(folder)
        others = [s for s in about["shards"] if s["from"] != row["from"]]
        about["shards"] = sorted([*others, row], key=lambda s: s["from"])
        atomic_write(folder / "store.json", json.dumps(about, indent=1))
    return _stored(about)


def _stored(about: dict[str, Any]) -> int:
    return sum(s["to"] - s["from"] for s in about["shards"])


def _begin(folder: Path, teacher: Any, keys: list[str], blocks: Blocks, options: Options, world: int) -> dict[str, Any]:
    """store.json of a new store, or of the unfinished one that is there."""
    head, block = _head(teacher), blocks.input_ids.shape[1]
    identity = {
        "version": VERSION,
        "options": json.loads(json.dumps(asdict(options))),
        "teacher": fingerprint(teacher),
        "blocks": len(keys),
        "block": block,
        "vocabulary": len(head.weight),
        "keys": xxhash.xxh3_128_hexdigest("".join(keys).encode()),
        "layers": teacher.config.get_text_config().num_hidden_layers,
        "hidden_size": head.weight.shape[1],
        "head": {"scale": head.scale, "softcap": head.softcap},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if (folder / "store.json").exists():
            about = _manifest(folder)
            changed = next((n for n, v in identity.items() if about.get(n) != v), None)
            if changed is not None:
                raise UserError(
                    f"{folder} holds targets of another {_NAMES.get(changed, changed)}; choose another folder"
                )
            return about
        atomic_write(folder / "keys.txt", "\n".join(keys) + "\n")
        if options.format == "hidden":
            weight = getattr(head, "stored", head.weight).detach().cpu().contiguous()
            bias = {} if head.bias is None else {"bias": head.bias.detach().cpu().contiguous()}
            atomic_write(folder / "head.safetensors", save({"weight": weight} | bias))
        step = max(1, teacher.plan.macro_batch // block) if hasattr(teacher, "plan") else _RESIDENT_BLOCKS
        about = identity | {"part": min(step, math.ceil(len(keys) / world)), "shards": []}
        atomic_write(folder / "store.json", json.dumps(about, indent=1))
    return about


_NAMES = {"keys": "text or tokenizer", "blocks": "text or tokenizer", "options": "format, temperature or features"}


def _head(teacher: Any) -> Any:
    return teacher.head if hasattr(teacher, "head") else model_head(teacher)


def _shards(answers: HiddenTargets, options: Options):
    """The answers in parts that make shards of at most about SHARD_BYTES."""
    _, block, hidden = answers.hidden.shape
    per_token = {
        "hidden": 2 * hidden,
        "full": 2 * len(answers.head.weight),
        "topk": 6 * options.k,
        "sampled": 3 * options.draws,
    }
    size = max(1, SHARD_BYTES // (per_token[options.format] * block))
    for start in range(0, len(answers), size):
        yield answers[start : start + size]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "store.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"targets {folder} is no store (it has no store.json); write one with `moe2dense targets`"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"targets {folder}/store.json cannot be read: {error}") from error
    if about.get("version") != VERSION:
        raise UserError(
            f"targets {folder} have version {about.get('version')}, this program reads {VERSION}; write them again"
        )
    return about


def open_targets(folder: str | Path, blocks: Blocks, teacher: Any = None, verify: bool = True) -> "StoredTargets":
    """The stored targets of `blocks`, found by the content of each block, so any part of the stored text in any order will do.

    verify: compare every shard with its checksum first. Raises UserError for a store that is unfinished or damaged, of other
    text or another tokenizer, or, when `teacher` is given, of another teacher.
    """
    folder = Path(folder)
    about = _manifest(folder)
    if (stored := _stored(about)) < about["blocks"]:
        raise UserError(
            f"targets {folder} are unfinished ({stored} of {about['blocks']} blocks); run `moe2dense targets` again"
        )
    if teacher is not None and fingerprint(teacher) != about["teacher"]:
        raise UserError(f"targets {folder} were written by another teacher; write them again")
    place = {key: i for i, key in enumerate((folder / "keys.txt").read_text().split())}
    wanted = blocks.keys()
    rows = [place.get(key, -1) for key in wanted]
    if (missing := sum(r < 0 for r in rows)) > 0:
        raise UserError(
            f"targets {folder} lack {missing} of the {len(rows)} blocks of the data: they are of other text, another "
            f"tokenizer or another block length ({about['block']}); pass the same --data, --block and --seed, or write them again"
        )
    if verify:
        for shard in about["shards"]:
            _verify(folder / shard["file"], shard["xxh3"])
    return StoredTargets(folder, about, rows)


def _verify(path: Path, expected: str) -> None:
    digest = xxhash.xxh3_64()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"targets {path} cannot be read: {error.strerror}; write the targets again") from error
    if digest.hexdigest() != expected:
        raise UserError(f"targets {path} are damaged (its checksum differs); write the targets again")


@dataclass
class StoredTargets:
    """Targets that are read from a store block by block. rows: where each block of the data lies in the store."""

    folder: Path
    about: dict[str, Any]
    rows: list[int]

    def __post_init__(self) -> None:
        options = self.about["options"]
        self.options = Options(**{**options, **{n: tuple(options[n]) for n in ("features", "routing")}})
        self.features = self.options.features
        self.layers: int = self.about["layers"]
        self.width: int = self.about["hidden_size"]
        self._shard_of = [i for i, s in enumerate(self.about["shards"]) for _ in range(s["from"], s["to"])]
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()  # a thread may read ahead

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def head(self) -> Head | None:
        """The teacher's head, in float32; None for formats that need none."""
        if self.options.format != "hidden":
            return None
        found = {k: v.float() for k, v in load_file(self.folder / "head.safetensors").items()}
        return Head(found["weight"], found.get("bias"), **self.about["head"])

    @property
    def hidden(self) -> Tensor | None:
        """All hidden states [N, S, H]; None for the other formats."""
        if self.options.format != "hidden":
            return None
        return torch.stack([self._read(i, read_block, "hidden")["hidden"] for i in range(len(self))])

    def token_weights(self, name: str) -> Tensor:
        """[N, S]: how the teacher routed each token (distillation/targets/record.py). Raises UserError where it was not stored."""
        if name not in self.options.routing:
            raise UserError(f"targets {self.folder} hold no {name}; write them again with --token-weights {name}")
        return torch.stack(
            [self._read(i, lambda s, row: s.get_slice(f"routing-{name}")[row]) for i in range(len(self))]
        )

    def _read(self, index: int, read: Any, *arguments: Any) -> Any:
        """read(open shard, row, ...) of one block."""
        row = self.rows[index]
        number = self._shard_of[row]
        shard = self.about["shards"][number]
        try:
            with self._lock:
                if number not in self._open:
                    self._open[number] = safe_open(self.folder / shard["file"], "pt")
                return read(self._open[number], row - shard["from"], *arguments)
        except (OSError, SafetensorError) as error:
            raise UserError(f"targets {self.folder / shard['file']} cannot be read: {error}") from error

    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """What the loss reads, at every position of some blocks."""
        blocks = [self._read(i, read_block, self.options.format) for i in indices]
        found = to_rows(blocks, self.options, self.head)
        if self.features and isinstance(found, HiddenRows):
            parts = [self._read(i, read_features, self.features) for i in indices]
            found.features = {k: torch.cat([p[k] for p in parts]) for k in self.features}
        return found
