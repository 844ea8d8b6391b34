"""A folder of text that a teacher wrote: shards of records that `--data` reads, with where they came from.

writing.json              teacher, settings, source of the prompts, checksum of every shard; a shard counts once it is listed here
parts/                    shares of single processes in a shard that is not listed yet
train-00000.jsonl.gz ...  {"prompt", "completion"} (or "text", where the prompt is learnt too; or "messages"), "nll", "stopped", "number"
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import from_first
from moe2dense.config.schema import WriteConfig
from moe2dense.data.options import DEFAULTS, TextOptions, document_prefix
from moe2dense.errors import UserError
from moe2dense.generation.filters import Filters, Sieve, parse_band
from moe2dense.generation.parts import drop_parts, written_by_all
from moe2dense.generation.prompts import Prompt, read_prompts
from moe2dense.generation.records import completion_of, filtered_records
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import Completion, check_lengths, generate
from moe2dense.teacher.model import Teacher
from moe2dense.weights.fingerprint import checkpoint_fingerprint

VERSION = 1
MANIFEST = "writing.json"
_MIN_PASSING = 0.02  # share of the texts: fewer after two shards is the filters' doing, not chance


def stop_ids(teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ids that end a text: the tokenizer's, and those in the checkpoint's generation_config.json."""
    ids = {*_ids(tokenizer.eos_token_id), *_ids(teacher.config.get_text_config().eos_token_id)}
    file = Path(teacher.path) / "generation_config.json"
    if file.is_file():
        ids |= set(_ids(json.loads(file.read_text()).get("eos_token_id")))
    return sorted(ids)


def _ids(value: Any) -> list[int]:
    """Return token ids that a config gives as one, several or none."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def sizes(settings: WriteConfig, positions: int, block: int, prefix: int = 0) -> tuple[int, int]:
    """Return (prompt tokens, new tokens); new_tokens 0 = what is left of a block, after `prefix` tokens before each prompt.

    Raises UserError when nothing is left.
    """
    new = settings.new_tokens or min(block, positions) - prefix - settings.prompt_tokens
    if new < 1:
        raise UserError(
            f"prompt_tokens {settings.prompt_tokens} leaves nothing to write of a block of {block}; lower it"
        )
    return settings.prompt_tokens, new


def write_text(
    teacher: Teacher,
    folder: str | Path,
    source: str | Path,
    settings: WriteConfig,
    tokens: int,
    *,
    block: int = 2048,
    split: str = "train",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[..., None] | None = None,
    options: TextOptions = DEFAULTS,
    different: int = 0,
) -> Path:
    """Let the teacher write about `tokens` tokens, prompts included; an unfinished folder is continued.

    Prompts are beginnings of `source`'s passages (see `read_prompts`); where the text needs more, they are continued again with
    other random numbers. Sequence-level distillation (Kim and Rush, 1606.07947) trains on the result. Under torch.distributed
    every process writes its share of each shard and rank 0 filters and lists them, so the result is that of one process. Raises
    UserError for a folder that holds something else, a teacher that writes nothing, and filters that drop nearly everything;
    finished shards stay. options: how the source is read. different: how many prompts are read before the first is continued again (0: all
    that there are).
    """
    folder, tokenizer = Path(folder), tokenizer or teacher.tokenizer()
    assert tokenizer is not None
    prompt_tokens, new = sizes(
        settings,
        getattr(teacher.config.get_text_config(), "max_position_embeddings", block),
        block,
        len(document_prefix(tokenizer, options.bos)),
    )
    sampling = Sampling(settings.temperature, settings.top_p, settings.beams, seed)
    sieve = Sieve(Filters(settings.min_tokens, parse_band(settings.nll), settings.duplicates, settings.same_script))

    def begin() -> dict[str, Any]:
        manifest = _begin(folder, _identity(teacher, source, settings, split, seed, new, options))
        _check_shards(folder, manifest, sieve)
        drop_parts(folder, _progress_of(manifest)[0])
        return manifest

    manifest = from_first(begin)
    again = sampling.temperature > 0
    prompts = _endless(source, tokenizer, split, seed, prompt_tokens, prompt_tokens + new, again, options, different)
    done, kept_tokens = _progress_of(manifest)
    for _ in islice(prompts, done):
        pass
    stop = stop_ids(teacher, tokenizer)
    while kept_tokens < tokens:
        batch = list(islice(prompts, min(settings.shard, -(-(tokens - kept_tokens) // (prompt_tokens + new)))))
        if not batch:
            break  # greedy text of every passage: there is no more
        texts = [p.ids for p in batch]
        check_lengths(teacher, texts, new)

        def write(rows: slice, texts: list[list[int]] = texts, done: int = done) -> list[Completion]:
            return generate(teacher, texts[rows], new, stop, sampling, first=done + rows.start)

        answers = written_by_all(folder, done, len(batch), write)
        add = partial(_add_round, folder, manifest, batch, answers, settings.learn_prompt, tokenizer, sieve)
        manifest = from_first(add)
        done, kept_tokens = _progress_of(manifest)
        if progress:
            progress("write", min(kept_tokens, tokens), tokens, tokens=kept_tokens)
    return folder


def _progress_of(manifest: dict[str, Any]) -> tuple[int, int]:
    """Return (prompts answered, tokens of the texts that passed) so far."""
    shards = manifest["shards"]
    return shards[-1]["to"] if shards else 0, sum(s["tokens"] for s in shards)


def _add_round(
    folder: Path,
    manifest: dict[str, Any],
    batch: list[Prompt],
    answers: list[Completion],
    learn_prompt: bool,
    tokenizer: PreTrainedTokenizerBase,
    sieve: Sieve,
) -> dict[str, Any]:
    """Filter the answers to `batch` and enter them as a shard; return writing.json as it is then."""
    done = _progress_of(manifest)[0]
    if not any(a.ids for a in answers):
        raise UserError(
            f"the teacher wrote only its end-of-text token after all {len(batch)} prompts; give longer prompts or others "
            f"(what was written before is kept in {folder})"
        )
    records = filtered_records(batch, answers, done, learn_prompt, tokenizer, sieve)
    tokens = sum(n for _, n in records)
    _add_shard(folder, manifest, [record for record, _ in records], done + len(batch), tokens, dict(sieve.dropped))
    drop_parts(folder, done + len(batch))
    _check_passing(manifest, sieve, folder)
    return manifest


def _identity(
    teacher: Teacher, source: str | Path, settings: WriteConfig, split: str, seed: int, new: int, options: TextOptions
) -> dict[str, Any]:
    """Return what must not change between the begin of a folder and its continuation."""
    writes = {k: v for k, v in asdict(settings).items() if k not in ("share", "extra", "shard")}
    return {
        "version": VERSION,
        "teacher": checkpoint_fingerprint(teacher.path),
        "prompts": {"source": str(source), "split": split} | asdict(options),
        "settings": writes | {"new_tokens": new, "seed": seed},
    }


def _begin(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return writing.json of a new folder, or of the unfinished one. Raises UserError where that is of other text."""
    if (folder / MANIFEST).exists():
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / MANIFEST} cannot be read: {error}; choose another folder") from error
        changed = next((n for n, v in identity.items() if manifest.get(n) != v), None)
        if changed is not None:
            raise UserError(
                f"{folder} holds text written with other {changed} ({manifest.get(changed)}, now {identity[changed]}); choose another folder"
            )
        return manifest
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no {MANIFEST}; choose another folder")
    manifest = identity | {"shards": []}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _check_shards(folder: Path, manifest: dict[str, Any], sieve: Sieve) -> None:
    """Compare finished shards with their checksums, and give the filters the texts that passed."""
    for shard in manifest["shards"]:
        try:
            data = (folder / shard["file"]).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / shard['file']} cannot be read: {error.strerror}; choose another folder"
            ) from error
        if xxhash.xxh3_64_hexdigest(data) != shard["xxh3"]:
            raise UserError(f"{folder / shard['file']} is damaged (its checksum differs); choose another folder")
        for line in gzip.decompress(data).decode().splitlines():
            sieve.remember(completion_of(json.loads(line)))
    if manifest["shards"]:
        sieve.dropped = Counter(manifest["shards"][-1]["dropped"])


def _endless(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    seed: int,
    prompt_tokens: int,
    stride: int,
    again: bool,
    options: TextOptions,
    different: int,
) -> Iterator[Prompt]:
    """Yield all prompts, and with `again` all of them again without end: other random numbers give other texts."""
    while True:
        prompts = read_prompts(source, tokenizer, split, seed, prompt_tokens, stride, options)
        yield from islice(prompts, different or None)
        if not again:
            return


def _add_shard(
    folder: Path, manifest: dict[str, Any], records: list[dict[str, Any]], to: int, tokens: int, dropped: dict[str, int]
) -> None:
    """Write records as the next shard and list it in writing.json."""
    shards = manifest["shards"]
    data = gzip.compress("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode(), mtime=0)
    name = f"train-{len(shards):05d}.jsonl.gz"
    atomic_write(folder / name, data)
    start = shards[-1]["to"] if shards else 0
    shards.append(
        {"file": name, "from": start, "to": to, "texts": len(records), "tokens": tokens, "dropped": dropped}
        | {"xxh3": xxhash.xxh3_64_hexdigest(data)}
    )
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1))


def _check_passing(manifest: dict[str, Any], sieve: Sieve, folder: Path) -> None:
    """Raise UserError when the filters drop nearly everything, instead of writing for ever."""
    shards = manifest["shards"]
    asked, texts = shards[-1]["to"], sum(s["texts"] for s in shards)
    if texts < _MIN_PASSING * asked and (len(shards) > 1 or texts == 0):
        worst, count = sieve.dropped.most_common(1)[0]
        raise UserError(
            f"the filters kept {texts} of {asked} written texts ({count} dropped by {worst}); loosen that filter "
            f"(what was kept is in {folder})"
        )


def summary(folder: str | Path) -> dict[str, Any]:
    """Return texts, tokens, prompts and dropped (by reason) of a written folder."""
    shards = json.loads((Path(folder) / MANIFEST).read_text())["shards"]
    return {
        "texts": sum(s["texts"] for s in shards),
        "tokens": sum(s["tokens"] for s in shards),
        "prompts": shards[-1]["to"] if shards else 0,
        "dropped": shards[-1]["dropped"] if shards else {},
    }
