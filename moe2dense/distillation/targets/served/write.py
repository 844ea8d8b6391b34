"""Write a served teacher's targets to a folder, as an ordinary store of the format topk (store.py).

parts/ holds each answer from the moment it came, so that a stopped command asks for nothing twice; when all are there they become
the store's shards. store.json says which server, which model, when, and how it was asked.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe2dense.common.files import atomic_write
from moe2dense.common.http import RequestFailed
from moe2dense.common.object_store import is_url
from moe2dense.common.progress import Report
from moe2dense.data.blocks import Blocks
from moe2dense.data.vocabulary import vocabulary_hash
from moe2dense.distillation.targets.formats import StoreOptions, id_dtype
from moe2dense.distillation.targets.identity import served_identity
from moe2dense.distillation.targets.places import FolderPlace
from moe2dense.distillation.targets.served.rows import answers_of, sequences_of
from moe2dense.distillation.targets.served.server import TeacherServer, failure
from moe2dense.distillation.targets.served.tokenizer_check import compare_tokenizers
from moe2dense.distillation.targets.store import KEYS, MANIFEST, TOKENIZER, VERSION, read_manifest, stored_blocks
from moe2dense.distillation.targets.write import SHARD_BYTES, list_shard, refuse_other, refuse_other_files
from moe2dense.errors import UserError

PARTS = "parts"
_REQUEST_NUMBERS = 2**16  # log-probabilities that one request asks for, at most where a block has fewer


def write_served_targets(
    server: TeacherServer,
    blocks: Blocks,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    progress: Report | None = None,
) -> str:
    """Store the k likeliest tokens that a served teacher gives at every position of `blocks`; return what is known of its tokenizer.

    tokenizer: that of the blocks. An unfinished store is continued; no answer that came in is asked for again. Raises UserError
    for a server that fails for good, has another tokenizer or takes no blocks of this length, and for a folder with other targets.
    """
    if is_url(folder):
        raise UserError(
            f"{folder} is a URL, and a server's answers are kept in a folder of this machine as they come; name one"
        )
    folder = Path(folder)
    length = blocks.input_ids.shape[1]
    if server.longest and length >= server.longest:
        raise UserError(
            f"--block {length} is too long for endpoint {server.url}: it takes {server.longest} tokens with the one that it writes after "
            f"them; give --block {server.longest - 1} or less"
        )
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    server = replace(server, k=min(server.k, vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".asking", timeout=0):
            return _write(server, blocks, tokenizer, folder, vocabulary, progress)
    except Timeout:
        raise UserError(f"{folder} is being written by another process; wait for it, or choose another --out") from None


def _write(
    server: TeacherServer,
    blocks: Blocks,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    vocabulary: int,
    progress: Report | None,
) -> str:
    manifest, compared = _begin(server, blocks, tokenizer, folder, vocabulary)
    step = _blocks_per_request(server, blocks.input_ids.shape[1])
    chunks = [range(start, min(start + step, len(blocks))) for start in range(0, len(blocks), step)]
    stored = stored_blocks(manifest)
    waiting = [chunk for chunk in chunks if chunk.start >= stored and _read_part(folder, chunk) is None]
    done = len(blocks) - sum(map(len, waiting))
    try:
        for chunk, tensors in _asked(server, blocks, waiting):
            atomic_write(_part(folder, chunk), save(tensors))
            done += len(chunk)
            if progress:
                progress("ask", done, len(blocks), tokens=done * blocks.input_ids.shape[1])
    except RequestFailed as error:
        remains = (
            f"the answers of {done} of {len(blocks)} blocks are in {folder}, and the same command asks for the others"
        )
        raise failure(server, error, remains) from None
    _note_date(folder)
    _make_shards(folder, [chunk for chunk in chunks if chunk.start >= stored])
    return compared


def _begin(
    server: TeacherServer, blocks: Blocks, tokenizer: PreTrainedTokenizerBase, folder: Path, vocabulary: int
) -> tuple[dict[str, Any], str]:
    """Return store.json of a new or an unfinished store, and what is known of the server's tokenizer.

    A new store is begun only after the tokenizers were compared. Raises UserError for other targets and another tokenizer.
    """
    keys = blocks.keys()
    options = StoreOptions("topk", 1.0, server.k)
    tokens = vocabulary_hash(tokenizer)
    identity = {
        "version": VERSION,
        "options": json.loads(json.dumps(asdict(options))),
        "teacher": served_identity(server.model, tokens),
        "blocks": len(keys),
        "block": blocks.input_ids.shape[1],
        "vocabulary": vocabulary,
        "keys": xxhash.xxh3_128_hexdigest("".join(keys).encode()),
        "layers": 0,
        "hidden_size": 0,
    }
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        refuse_other(FolderPlace(folder), manifest, identity)
        return manifest, manifest["source"]["tokenizer"]
    refuse_other_files(FolderPlace(folder))
    compared = compare_tokenizers(server, tokenizer, blocks.input_ids.tolist()).sentence()
    source = {
        "server": server.url,
        "kind": server.protocol.name,
        "server_version": server.version,
        "model": server.model,
        "begun": _today(),
        "log_probabilities": f"{server.k} likeliest of the model's own distribution: temperature 1, no filter, no penalty",
        "tokenizer": compared,
    }
    manifest = identity | {"source": source, "shards": []}
    atomic_write(folder / KEYS, "\n".join(keys) + "\n")
    (folder / PARTS).mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder / TOKENIZER)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest, compared


def _today() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _note_date(folder: Path) -> None:
    """Write down when the last answer came, once."""
    manifest = read_manifest(folder)
    if "answered" not in manifest["source"]:
        manifest["source"]["answered"] = _today()
        atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1))


def _blocks_per_request(server: TeacherServer, length: int) -> int:
    if not server.protocol.batches:
        return 1
    return max(1, _REQUEST_NUMBERS // (length * (server.k + 1)))


def _asked(server: TeacherServer, blocks: Blocks, chunks: Sequence[range]) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """Yield the tensors of each chunk as its answer arrives, `server.parallel` of them under way at a time.

    After a failure what is under way is still yielded, then RequestFailed is raised.
    """

    def ask(chunk: range) -> dict[str, Tensor]:
        part = blocks[list(chunk)]
        sequences = sequences_of(part)
        rows = answers_of(part, sequences, server.likeliest([ids for _, _, ids in sequences]), server.k)
        return {"ids": rows.ids, "log_p": rows.log_p}

    failed: RequestFailed | None = None
    todo, running = iter(chunks), {}
    with ThreadPoolExecutor(server.parallel) as pool:
        while True:
            while failed is None and len(running) < server.parallel and (chunk := next(todo, None)) is not None:
                running[pool.submit(ask, chunk)] = chunk
            if not running:
                break
            finished: set[Future[dict[str, Tensor]]] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                chunk = running.pop(future)
                try:
                    tensors = future.result()
                except RequestFailed as error:
                    failed = failed or error
                else:
                    yield chunk, tensors
    if failed is not None:
        raise failed


def _part(folder: Path, chunk: range) -> Path:
    return folder / PARTS / f"{chunk.start:07d}-{chunk.stop:07d}.safetensors"


def _read_part(folder: Path, chunk: range) -> dict[str, Tensor] | None:
    """Return what came in for a chunk of blocks; None where nothing did, or it is damaged and has to be asked for again."""
    with contextlib.suppress(OSError, SafetensorError, ValueError):
        tensors = load_file(_part(folder, chunk))
        if set(tensors) == {"ids", "log_p"} and len(tensors["ids"]) == len(tensors["log_p"]) == len(chunk):
            return tensors
    return None


def _make_shards(folder: Path, chunks: Sequence[range]) -> None:
    """Join the parts to shards of about SHARD_BYTES, list each and remove its parts."""
    vocabulary = read_manifest(folder)["vocabulary"]
    gathered: list[dict[str, Tensor]] = []
    first = 0
    for number, chunk in enumerate(chunks):
        tensors = _read_part(folder, chunk)
        if tensors is None:
            raise UserError(f"{_part(folder, chunk)} is damaged; the same command asks for it again")
        gathered.append(tensors)
        size = sum(6 * part["ids"].numel() for part in gathered)
        if size < SHARD_BYTES and number + 1 < len(chunks):
            continue
        start = chunks[first].start
        ids = torch.cat([part["ids"] for part in gathered])
        ids = ids.to(id_dtype(max(vocabulary, int(ids.max()) + 1)))
        data = save({"ids": ids, "log_p": torch.cat([part["log_p"] for part in gathered]).half()})
        name = f"shard-{start:07d}.safetensors"
        atomic_write(folder / name, data)
        list_shard(
            FolderPlace(folder), {"file": name, "from": start, "to": chunk.stop, "xxh3": xxhash.xxh3_64_hexdigest(data)}
        )
        for finished in chunks[first : number + 1]:
            _part(folder, finished).unlink(missing_ok=True)
        gathered, first = [], number + 1
    shutil.rmtree(folder / PARTS, ignore_errors=True)
