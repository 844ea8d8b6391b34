"""Write a teacher's targets to a folder or below a URL (store.py), continuing a store that is unfinished.

Several processes may write one store: each runs the teacher on every WORLD-th part of the text and lists its shards under a lock.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save

from moe2dense.common.processes import launched, wait_for_all
from moe2dense.data.blocks import Blocks
from moe2dense.distillation.targets.formats import Format, StoreOptions, write_features
from moe2dense.distillation.targets.identity import teacher_identity
from moe2dense.distillation.targets.memory import HiddenTargets, hidden_targets
from moe2dense.distillation.targets.places import Place, place_of
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.store import (
    HEAD,
    KEYS,
    MANIFEST,
    VERSION,
    format_of,
    manifest_at,
    stored_blocks,
)
from moe2dense.distillation.targets.token_weights import check_token_weights
from moe2dense.errors import UserError
from moe2dense.modeling.head import OutputHead
from moe2dense.modeling.hooks import feature_name
from moe2dense.teacher.cost import recording_batch
from moe2dense.teacher.kinds import AnyTeacher, teacher_head
from moe2dense.teacher.model import Teacher

SHARD_BYTES = 256 * 2**20
_RESIDENT_BLOCKS = 64  # of a part, for a teacher in memory

# what a user gave otherwise, where an entry of the manifest differs
_SETTING_OF = {"keys": "text or tokenizer", "blocks": "text or tokenizer", "options": "format, temperature or features"}


@torch.no_grad()
def write_targets(
    teacher: AnyTeacher,
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
    progress: Callable[..., None] | None = None,
) -> str | Path:
    """Store the teacher's distributions at every position of `blocks`; return the place, `folder`.

    An unfinished store is continued at its next shard. folder: may be a URL, to which each shard is written from memory. teacher: a
    Teacher, streamed in as few passes as its memory budget allows, or a transformers model. format: hidden, sampled (`draws` at
    `temperature`), topk (`k` at `temperature`) or full;
    features: of some layers, stored with hidden targets in 8 bits, by name or layer number; routing: names of token weights
    to store. Under torchrun every process writes its share. Raises UserError for what cannot be stored, a folder that holds
    other targets, or a full disk.
    """
    names = tuple(feature_name(f) for f in features)
    _check(format, temperature, k, draws, names)
    for name in routing:
        check_token_weights(name)
    k = min(k, len(teacher_head(teacher).weight))
    options = StoreOptions(format, temperature, k, draws, seed=seed, features=names, routing=tuple(routing))
    rank, world = launched()
    place = place_of(folder)
    manifest = _begin(place, teacher, blocks, options, world)
    part = manifest["part"]
    for start in range(rank * part, len(blocks), world * part):
        _write_part(place, teacher, blocks, start, min(start + part, len(blocks)), format_of(options), progress)
    wait_for_all()
    return folder


def _check(format: str, temperature: float, k: int, draws: int, features: Sequence[str]) -> None:
    if format not in TARGET_FORMATS:
        raise UserError(f"format must be one of {', '.join(TARGET_FORMATS)}; found {format!r}")
    if not 1 <= draws <= 255:
        raise UserError(f"draws must lie between 1 and 255; found {draws}")
    if k < 1:
        raise UserError(f"k must be at least 1; found {k}")
    if temperature <= 0:
        raise UserError(f"temperature must be above 0; found {temperature:g}")
    if features and format != "hidden":
        raise UserError(f"features ride along with hidden targets only; found format {format!r}")


def _begin(place: Place, teacher: AnyTeacher, blocks: Blocks, options: StoreOptions, world: int) -> dict[str, Any]:
    """Return store.json of a new or an unfinished store. Raises UserError where that is of other targets."""
    head, keys = teacher_head(teacher), blocks.keys()
    identity = _identity(teacher, head, blocks, keys, options)
    place.begin()
    with place.lock():
        if place.has(MANIFEST):
            manifest = manifest_at(place)
            refuse_other(place, manifest, identity)
            return manifest
        refuse_other_files(place)
        place.write(KEYS, ("\n".join(keys) + "\n").encode())
        if options.format == "hidden":
            bias = {} if head.bias is None else {"bias": head.bias.detach().cpu().contiguous()}
            weight = head.stored.detach().cpu().contiguous()
            place.write(HEAD, save({"weight": weight} | bias))
        part = _RESIDENT_BLOCKS
        if isinstance(teacher, Teacher):
            tokens = teacher.plan.macro_batch
            if teacher.resident:  # reading again costs nothing
                tokens = recording_batch(tokens, len(options.features))
            part = max(1, tokens // identity["block"])
        manifest = identity | {"part": min(part, math.ceil(len(keys) / world)), "shards": []}
        write_manifest(place, manifest)
    return manifest


def write_manifest(place: Place, manifest: dict[str, Any]) -> None:
    """Write store.json."""
    place.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def refuse_other_files(place: Place) -> None:
    """Raise UserError for a place that holds anything but what a store begins with, such as a model's files."""
    own = (".lock", ".asking", KEYS, HEAD, "tokenizer", "parts")
    other = [name for name in place.names() if name not in own and not name.endswith((".tmp", ".partial"))]
    if other:
        raise UserError(f"{place.name} holds other files ({other[0]}); choose another folder for the targets")


def refuse_other(place: Place, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError where the store in `place` is not of this text, teacher and format, and so cannot be continued."""
    changed = next((n for n, v in identity.items() if manifest.get(n) != v), None)
    if changed is not None:
        setting = _SETTING_OF.get(changed, changed)
        raise UserError(f"{place.name} holds targets of another {setting}; choose another folder")


def _identity(
    teacher: AnyTeacher, head: OutputHead, blocks: Blocks, keys: list[str], options: StoreOptions
) -> dict[str, Any]:
    """Return what must not change between the begin of a store and its continuation."""
    return {
        "version": VERSION,
        "options": json.loads(json.dumps(asdict(options))),
        "teacher": teacher_identity(teacher),
        "blocks": len(keys),
        "block": blocks.input_ids.shape[1],
        "vocabulary": len(head.weight),
        "keys": xxhash.xxh3_128_hexdigest("".join(keys).encode()),
        "layers": teacher.config.get_text_config().num_hidden_layers,
        "hidden_size": head.weight.shape[1],
        "head": {"scale": head.scale, "softcap": head.softcap},
    }


def _write_part(
    place: Place,
    teacher: AnyTeacher,
    blocks: Blocks,
    start: int,
    stop: int,
    format: Format,
    progress: Callable[..., None] | None,
) -> None:
    """Run the teacher on the blocks [start, stop) that are not listed yet, and write their shards."""
    options = format.options
    done = max([s["to"] for s in manifest_at(place)["shards"] if start <= s["from"] < stop], default=start)
    if done >= stop:
        return
    answers = hidden_targets(teacher, blocks[done:stop], features=options.features, routing=options.routing)
    for piece in _pieces(answers, format):
        tensors = format.write(piece.hidden, piece.head, done) | write_features(piece.features)
        tensors |= {f"routing-{n}": v.half() for n, v in piece.routing.items()}
        data = save({n: t.contiguous() for n, t in tensors.items()})
        name = f"shard-{done:07d}.safetensors"
        place.write(name, data)
        row = {"file": name, "from": done, "to": done + len(piece), "xxh3": xxhash.xxh3_64_hexdigest(data)}
        done += len(piece)
        written = list_shard(place, row)
        if progress:
            progress("targets", written, len(blocks), tokens=written * blocks.input_ids.shape[1])


def _pieces(answers: HiddenTargets, format: Format) -> Iterator[HiddenTargets]:
    """Yield the answers in parts that make shards of at most about SHARD_BYTES."""
    _, block, hidden_size = answers.hidden.shape
    size = max(1, SHARD_BYTES // (format.bytes_per_token(hidden_size, len(answers.head.weight)) * block))
    for start in range(0, len(answers), size):
        yield answers[start : start + size]


def list_shard(place: Place, row: dict[str, Any]) -> int:
    """Enter a finished shard in store.json; return how many blocks are stored."""
    with place.lock():
        manifest = manifest_at(place)
        others = [s for s in manifest["shards"] if s["from"] != row["from"]]
        manifest["shards"] = sorted([*others, row], key=lambda s: s["from"])
        write_manifest(place, manifest)
    return stored_blocks(manifest)
