"""Targets on disk: written once by streaming the teacher, read without it.

store.json            format, teacher, sizes, checksum of every shard; a shard counts once it is listed here
keys.txt              the content hash of every block, in order
head.safetensors      the teacher's head (hidden only)
shard-00000.safetensors ...
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from moe2dense.data import Blocks
from moe2dense.errors import UserError
from moe2dense.losses.head import Head, model_head
from moe2dense.losses.rows import HiddenRows, TeacherRows
from moe2dense.run import atomic_write
from moe2dense.targets.formats import (
    FORMATS,
    WRITERS,
    Options,
    read_block,
    read_features,
    to_rows,
    write_features,
)
from moe2dense.targets.memory import HiddenTargets, Progress, hidden_targets

# N blocks, S block length, H hidden, V vocabulary

VERSION = 1
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
    features: Sequence[int] = (),
    progress: Progress | None = None,
) -> Path:
    """Store the teacher's distributions at every position of `blocks`; an unfinished store is continued at its next shard.

    teacher: a Teacher, streamed in as few passes as its memory budget allows, or a resident transformers model. format:
    hidden, sampled (`draws` at `temperature`), topk (`k` at `temperature`) or full; features: layers whose residual stream
    rides along with hidden targets, in 8 bits. Raises UserError for an unknown format, a
    folder that holds other targets, or a full disk.
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}; found {format!r}")
    if not 1 <= draws <= 255:
        raise UserError(f"draws must lie between 1 and 255; found {draws}")
    if features and format != "hidden":
        raise UserError(f"features ride along with hidden targets only; found format {format!r}")
    folder, keys = Path(folder), blocks.keys()
    options = Options(
        format, temperature, min(k, len(_head(teacher).weight)), draws, seed=seed, features=tuple(features)
    )
    about = _begin(folder, teacher, keys, blocks, options)
    done = about["shards"][-1]["to"] if about["shards"] else 0
    block = blocks.input_ids.shape[1]
    step = max(1, teacher.plan.macro_batch // block) if hasattr(teacher, "plan") else _RESIDENT_BLOCKS
    while done < len(blocks):
        part = blocks[done : done + step]
        answers = hidden_targets(teacher, part, features=features)
        for piece in _shards(answers, options):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + done)
            tensors = WRITERS[format](piece.hidden, piece.head, options, generator) | write_features(piece.features)
            data = save({n: t.contiguous() for n, t in tensors.items()})
            name = f"shard-{len(about['shards']):05d}.safetensors"
            atomic_write(folder / name, data)
            row = {"file": name, "from": done, "to": done + len(piece), "xxh3": xxhash.xxh3_64_hexdigest(data)}
            about["shards"].append(row)
            atomic_write(folder / "store.json", json.dumps(about, indent=1))
            done += len(piece)
            if progress:
                progress("targets", done, len(blocks), tokens=done * block)
    return folder


def _begin(folder: Path, teacher: Any, keys: list[str], blocks: Blocks, options: Options) -> dict[str, Any]:
    """store.json of a new store, or of the unfinished one that is there."""
    head = _head(teacher)
    identity = {
        "version": VERSION,
        "options": json.loads(json.dumps(asdict(options))),
        "teacher": fingerprint(teacher),
        "blocks": len(keys),
        "block": blocks.input_ids.shape[1],
        "vocabulary": len(head.weight),
        "keys": xxhash.xxh3_128_hexdigest("".join(keys).encode()),
        "layers": teacher.config.get_text_config().num_hidden_layers,
        "head": {"scale": head.scale, "softcap": head.softcap},
    }
    if (folder / "store.json").exists():
        about = _manifest(folder)
        changed = next((n for n, v in identity.items() if about.get(n) != v), None)
        if changed is not None:
            raise UserError(f"{folder} holds targets of another {_NAMES.get(changed, changed)}; choose another folder")
        return about
    atomic_write(folder / "keys.txt", "\n".join(keys) + "\n")
    if options.format == "hidden":
        weight = getattr(head, "stored", head.weight).detach().cpu().contiguous()
        tensors = {"weight": weight} | ({} if head.bias is None else {"bias": head.bias.detach().cpu().contiguous()})
        atomic_write(folder / "head.safetensors", save(tensors))
    about = identity | {"shards": []}
    atomic_write(folder / "store.json", json.dumps(about, indent=1))
    return about


_NAMES = {"keys": "text or tokenizer", "blocks": "text or tokenizer", "options": "format or temperature"}


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
    stored = about["shards"][-1]["to"] if about["shards"] else 0
    if stored < about["blocks"]:
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
        self.options = Options(**{**options, "features": tuple(options["features"])})
        self.features = self.options.features
        self.layers: int = self.about["layers"]
        self._shard_of = [i for i, s in enumerate(self.about["shards"]) for _ in range(s["from"], s["to"])]
        self._open: dict[int, Any] = {}

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
        return torch.stack([self._block(i)["hidden"] for i in range(len(self))])

    def _block(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        number = self._shard_of[row]
        shard = self.about["shards"][number]
        try:
            if number not in self._open:
                self._open[number] = safe_open(self.folder / shard["file"], "pt")
            return read_block(self._open[number], row - shard["from"], self.options.format)
        except (OSError, SafetensorError) as error:
            raise UserError(f"targets {self.folder / shard['file']} cannot be read: {error}") from error

    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """What the loss reads, at every position of some blocks."""
        found = to_rows([self._block(i) for i in indices], self.options, self.head)
        if self.features and isinstance(found, HiddenRows):
            parts = [self._features(i) for i in indices]
            found.features = {k: torch.cat([p[k] for p in parts]) for k in self.features}
        return found

    def _features(self, index: int) -> dict[int, Tensor]:
        number = self._shard_of[self.rows[index]]
        row = self.rows[index] - self.about["shards"][number]["from"]
        return read_features(self._open[number], row, self.features)
