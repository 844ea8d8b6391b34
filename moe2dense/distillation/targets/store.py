"""Targets in a folder or below a URL: opened without the teacher that wrote them (write.py), and read block by block.

store.json            format, teacher, sizes, checksum of every shard; a shard counts once it is listed here
keys.txt              the content hash of every block, in order
head.safetensors      the teacher's head (hidden only)
tokenizer/            the tokenizer of a teacher that was served
shard-0000000.safetensors ...   named by its first block
"""

import json
import pkgutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.common.files import content_errors
from moe2dense.common.object_store import is_url
from moe2dense.common.units import parse_bytes
from moe2dense.config.training import TrainConfig
from moe2dense.data.blocks import Blocks
from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.distillation.targets.formats import FEATURE_BYTES, Format, StoreOptions, read_features
from moe2dense.distillation.targets.identity import same_teacher, teacher_identity
from moe2dense.distillation.targets.places import REMEDY, Place, place_of
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.distillation.targets.remote import RemoteShards, file_checksum
from moe2dense.errors import UserError
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.losses.teacher_rows import HiddenRows, TeacherRows
from moe2dense.modeling.head import Head
from moe2dense.teacher.kinds import AnyTeacher
from moe2dense.teacher.model import Teacher
from moe2dense.weights.tensors import read_tensors

# N blocks, S block length, H hidden, V vocabulary

MANIFEST, KEYS, HEAD, TOKENIZER = "store.json", "keys.txt", "head.safetensors", "tokenizer"
VERSION = 3
_KINDS = {
    "teacher": str,
    "blocks": int,
    "block": int,
    "layers": int,
    "hidden_size": int,
    "options": dict,
    "shards": list,
}
_SHARD_KINDS = {"file": str, "from": int, "to": int, "xxh3": str}
Value = TypeVar("Value")


def format_of(options: StoreOptions) -> Format:
    """Return the format that a store was, or is to be, written in."""
    return pkgutil.resolve_name(TARGET_FORMATS[options.format].implementation)(options)


def token_bytes(options: StoreOptions, hidden_size: int, vocabulary: int) -> float:
    """Return the bytes that a store takes of a token, features included, for a teacher of these sizes."""
    stored = format_of(options).bytes_per_token(hidden_size, vocabulary)
    return stored + FEATURE_BYTES * hidden_size * len(options.features)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read store.json of a folder or a URL. Raises UserError for what is no store, a damaged one, or one of another version."""
    return manifest_at(place_of(folder))


def manifest_at(place: Place) -> dict[str, Any]:
    """Read store.json. Raises UserError as `read_manifest`."""
    if not place.has(MANIFEST):
        raise UserError(f"targets {place.name} is no store (it has no store.json); write one with `moe2dense targets`")
    manifest = place.read_object(MANIFEST)
    if manifest.get("version") != VERSION:
        raise UserError(
            f"targets {place.name} have version {manifest.get('version')}, this program reads {VERSION}; write them again"
        )
    with content_errors(f"{place.name}/{MANIFEST}", REMEDY):
        _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise TypeError, KeyError or ValueError where store.json is not as it is written."""
    for table, kinds in ((manifest, _KINDS), *((shard, _SHARD_KINDS) for shard in manifest["shards"])):
        for name, kind in kinds.items():
            if type(table[name]) is not kind:
                raise TypeError(f"{name} is {table[name]!r}, not {kind.__name__}")
    known = ("layers", "hidden_size") if "source" not in manifest else ()  # of a served teacher nobody says
    sizes = [manifest[name] for name in ("blocks", "block", *known)]
    if min(sizes) < 1 or not all(0 <= s["from"] < s["to"] for s in manifest["shards"]):
        raise ValueError("its sizes cannot be right")
    options = manifest["options"]
    StoreOptions(**{**options, **{n: tuple(options[n]) for n in ("features", "routing")}})
    if options["format"] not in TARGET_FORMATS:
        raise ValueError(f"format is {options['format']!r}")
    for shard in manifest["shards"]:
        if Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"shard {shard['file']!r} is not in its folder")


def targets_room(config: TrainConfig) -> int | None:
    """Return the bytes that copies of targets at a URL may take here, None without a bound. Raises UserError."""
    return parse_bytes(config.targets_disk, "--targets-disk") if config.targets_disk else None


def stored_blocks(manifest: dict[str, Any]) -> int:
    """Return how many blocks the listed shards hold."""
    return sum(s["to"] - s["from"] for s in manifest["shards"])


def open_targets(
    folder: str | Path,
    blocks: Blocks,
    teacher: AnyTeacher | None = None,
    verify: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    room: int | None = None,
) -> "StoredTargets":
    """Open the stored targets of `blocks`, which may be any part of the stored text in any order.

    folder: may be a URL, whose shards are then compared with their checksums as they are copied here; room: bytes that these copies
    may take, None = as much as the disk has. Blocks are told by their content. verify: compare every shard with its checksum first.
    Raises UserError for a store that is unfinished or damaged, of other text or another tokenizer, or, when `teacher` is given, of
    another teacher. Of a served teacher the tokenizer is known, which is compared with the teacher's or with `tokenizer`.
    """
    manifest = read_manifest(folder)
    remote = RemoteShards(str(folder), room) if is_url(folder) else None
    own = Path(folder) if remote is None else _fetched(remote, manifest)
    if (stored := stored_blocks(manifest)) < manifest["blocks"]:
        raise UserError(
            f"targets {folder} are unfinished ({stored} of {manifest['blocks']} blocks); run `moe2dense targets` again"
        )
    _check_teacher(folder, own, manifest, teacher, tokenizer)
    with content_errors(own / KEYS, REMEDY):
        listed = (own / KEYS).read_text().split()
        if len(listed) != manifest["blocks"]:
            raise ValueError(f"it lists {len(listed)} blocks of {manifest['blocks']}")
    places = {key: i for i, key in enumerate(listed)}
    keys = blocks.keys()
    rows = [places.get(key, -1) for key in keys]
    if (missing := sum(r < 0 for r in rows)) > 0:
        raise UserError(
            f"targets {folder} lack {missing} of the {len(rows)} blocks of the data: they are of other text, another tokenizer "
            f"or another block length ({manifest['block']}); pass the same --data, --block and --seed, or write them again"
        )
    if verify and remote is None:
        for shard in manifest["shards"]:
            _verify(own / shard["file"], shard["xxh3"])
    return StoredTargets(own, manifest, rows, remote)


def _fetched(remote: RemoteShards, manifest: dict[str, Any]) -> Path:
    """Return a folder with the files of a remote store, shards left out."""
    remote.small_file(KEYS)
    if manifest["options"]["format"] == "hidden":
        remote.small_file(HEAD)
    remote.small_folder(TOKENIZER)
    return remote.folder


def _check_teacher(
    folder: str | Path,
    own: Path,
    manifest: dict[str, Any],
    teacher: AnyTeacher | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise UserError where the targets are not the teacher's, or those of a served one with another vocabulary.

    own: the folder of this machine with the store's files; folder: what the user named, for errors.
    """
    if (own / TOKENIZER).is_dir():
        wanted = teacher.tokenizer() if isinstance(teacher, Teacher) else tokenizer
        if wanted is None:
            return
        compared = compare_vocabularies(load_tokenizer(own / TOKENIZER, remedy=REMEDY), wanted)
        if not compared.same:
            raise UserError(
                f"targets {folder} are of a teacher with another tokenizer ({compared.difference}); take a student that has it"
            )
        return
    with content_errors(f"{folder}/{MANIFEST}", REMEDY):
        of_this_teacher = teacher is None or same_teacher(manifest["teacher"], teacher_identity(teacher))
    if not of_this_teacher:
        raise UserError(f"targets {folder} were written by another teacher; write them again")


def _verify(path: Path, expected: str) -> None:
    try:
        digest = file_checksum(path)
    except OSError as error:
        raise UserError(f"targets {path} cannot be read: {error.strerror}; write the targets again") from error
    if digest != expected:
        raise UserError(f"targets {path} are damaged (its checksum differs); write the targets again")


@dataclass
class StoredTargets:
    """Targets that are read from a store block by block. rows: the place in the store of each block of the data.

    folder: of this machine, with the store's files; remote: its shards, where they lie below a URL.
    """

    folder: Path
    manifest: dict[str, Any]
    rows: list[int]
    remote: RemoteShards | None = None

    def __post_init__(self) -> None:
        options = self.manifest["options"]
        self.options = StoreOptions(**{**options, **{n: tuple(options[n]) for n in ("features", "routing")}})
        self.format = format_of(self.options)
        self.features = self.options.features
        self.layers: int = self.manifest["layers"]
        self.width: int = self.manifest["hidden_size"]
        self._shard_of = [i for i, s in enumerate(self.manifest["shards"]) for _ in range(s["from"], s["to"])]
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()  # a thread may read ahead

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> str:
        """What tells this store's answers from another's: its format, and a hash of its teacher and options."""
        said = json.dumps([self.manifest["teacher"], self.manifest["options"]], sort_keys=True)
        return f"{self.options.format}-{xxhash.xxh3_64_hexdigest(said.encode())}"

    @cached_property
    def head(self) -> Head | None:
        """The teacher's head, in torch's default precision, float32; None for formats that need none."""
        if self.options.format != "hidden":
            return None
        tensors = {k: v.to(torch.get_default_dtype()) for k, v in read_tensors(self.folder / HEAD, REMEDY).items()}
        return Head(tensors["weight"], tensors.get("bias"), **self.manifest["head"])

    @property
    def hidden(self) -> Tensor | None:
        """All hidden states [N, S, H]; None for the other formats."""
        if self.options.format != "hidden":
            return None
        return torch.stack([self._read(i, self.format.read)["hidden"] for i in range(len(self))])

    def token_weights(self, name: str) -> Tensor:
        """Return [N, S]: how the teacher routed each token. Raises UserError where it was not stored."""
        if name not in self.options.routing:
            raise UserError(f"targets {self.folder} hold no {name}; write them again with --token-weights {name}")
        return torch.stack(
            [self._read(i, lambda shard, row: shard.get_slice(f"routing-{name}")[row]) for i in range(len(self))]
        )

    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """Read what the loss needs, at every position of some blocks."""
        rows = self.format.rows([self._read(i, self.format.read) for i in indices], self.head)
        if self.features and isinstance(rows, HiddenRows):
            parts = [self._read(i, lambda shard, row: read_features(shard, row, self.features)) for i in indices]
            rows.features = {k: torch.cat([p[k] for p in parts]) for k in self.features}
        return rows

    def _read(self, index: int, read: Callable[[Any, int], Value]) -> Value:
        """Return read(open shard, row) of one block."""
        row = self.rows[index]
        number = self._shard_of[row]
        shard = self.manifest["shards"][number]
        path = self.folder / shard["file"]
        try:
            with self._lock, content_errors(path, REMEDY):
                if number not in self._open:
                    self._open[number] = self._opened(path, shard)
                return read(self._open[number], row - shard["from"])
        except SafetensorError as error:
            raise UserError(f"targets {path} cannot be read: {error}; {REMEDY}") from error

    def _opened(self, path: Path, shard: dict[str, Any]) -> Any:
        """Return a shard of which rows can be read."""
        return safe_open(path, "pt") if self.remote is None else self.remote.open(shard["file"], shard["xxh3"])
