"""A dataset that a teacher wrote: shards of records that `--data` reads, with where they came from.

writing.json              teacher, settings, source of the prompts, checksum of every shard; a shard counts once it is listed here
parts/                    what single processes have written of a shard that is not listed yet
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

from moe2dense.common.files import atomic_write
from moe2dense.common.processes import from_first
from moe2dense.config.schema import WriteConfig
from moe2dense.errors import UserError
from moe2dense.generation.filters import Filters, Sieve, parse_band
from moe2dense.generation.parts import drop_parts, written_by_all
from moe2dense.generation.prompts import Prompt, read_prompts
from moe2dense.generation.sampling import Sampling
from moe2dense.generation.streamed import Completion, check_lengths, generate
from moe2dense.weights.fingerprint import checkpoint_fingerprint

VERSION = 1
MANIFEST = "writing.json"
_HOPELESS = 0.02  # of the texts kept after two shards: the filters, not chance


def stop_ids(teacher: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the tokenizer's end-of-text token and what the checkpoint's generation_config.json names."""
    found = {tokenizer.eos_token_id, *_ids(teacher.config.get_text_config().eos_token_id)}
    file = Path(teacher.path) / "generation_config.json"
    if file.is_file():
        found |= set(_ids(json.loads(file.read_text()).get("eos_token_id")))
    return sorted(i for i in found if i is not None)


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def sizes(settings: WriteConfig, positions: int, block: int) -> tuple[int, int]:
    """(prompt tokens, new tokens): new_tokens 0 = what is left of a block. Raises UserError when nothing is."""
    new = settings.new_tokens or min(block, positions) - settings.prompt_tokens
    if new < 1:
        raise UserError(
            f"prompt_tokens {settings.prompt_tokens} leaves nothing to write of a block of {block}; lower it"
        )
    return settings.prompt_tokens, new


def write_text(
    teacher: Any,
    folder: str | Path,
    source: str | Path,
    settings: WriteConfig,
    tokens: int,
    *,
    block: int = 2048,
    split: str = "train",
    seed: int = 0,
    tokenizer: Any = None,
    progress: Callable[..., None] | None = None,
) -> Path:
    """Let the teacher write about `tokens` tokens, prompts included, into `folder`; an unfinished folder is continued.

    Prompts are beginnings of `source`'s passages (see `read_prompts`); they come round again, drawn anew, when the text needs more.
    Sequence-level distillation (Kim and Rush, 1606.07947) trains on the result. Under torch.distributed every process writes its
    share of each shard and rank 0 filters and lists them, so the result is that of one process. Raises UserError for a folder
    that holds something else, a teacher that writes nothing, and filters that keep nothing; finished shards stay.
    """
    folder, tokenizer = Path(folder), tokenizer or teacher.tokenizer()
    prompt_tokens, new = sizes(
        settings, getattr(teacher.config.get_text_config(), "max_position_embeddings", block), block
    )
    sampling = Sampling(settings.temperature, settings.top_p, settings.beams, seed)
    sieve = Sieve(Filters(settings.min_tokens, parse_band(settings.nll), settings.duplicates, settings.same_script))

    def begin() -> dict[str, Any]:
        about = _begin(folder, _identity(teacher, source, settings, split, seed, new))
        _check_shards(folder, about, sieve)
        drop_parts(folder, _done(about)[0])
        return about

    about = from_first(begin)
    prompts = _endless(source, tokenizer, split, seed, prompt_tokens, prompt_tokens + new, sampling.temperature > 0)
    done, kept = _done(about)
    for _ in islice(prompts, done):
        pass
    stop = stop_ids(teacher, tokenizer)
    while kept < tokens:
        batch = list(islice(prompts, min(settings.shard, -(-(tokens - kept) // (prompt_tokens + new)))))
        if not batch:
            break  # greedy text of every passage: there is no more
        texts = [p.ids for p in batch]
        check_lengths(teacher, texts, new)

        def write(rows: slice, texts: list[list[int]] = texts, done: int = done) -> list[Completion]:
            return generate(teacher, texts[rows], new, stop, sampling, first=done + rows.start)

        answers = written_by_all(folder, done, len(batch), write)
        add = partial(_add_round, folder, about, batch, answers, settings.learn_prompt, tokenizer, sieve)
        about = from_first(add)
        done, kept = _done(about)
        if progress:
            progress("write", min(kept, tokens), tokens, tokens=kept)
    return folder


def _done(about: dict[str, Any]) -> tuple[int, int]:
    """(prompts answered, tokens kept) so far."""
    return about["shards"][-1]["to"] if about["shards"] else 0, sum(s["tokens"] for s in about["shards"])


def _add_round(
    folder: Path,
    about: dict[str, Any],
    batch: list[Prompt],
    answers: list[Completion],
    learn: bool,
    tokenizer: Any,
    sieve: Sieve,
) -> dict[str, Any]:
    """Filter what was written after `batch` and enter it as a shard; returns what writing.json says then."""
    done = _done(about)[0]
    if not any(a.ids for a in answers):
        raise UserError(
            f"the teacher wrote only its end-of-text token after all {len(batch)} prompts; give longer prompts or others "
            f"(what was written before is kept in {folder})"
        )
    rows = _records(batch, answers, done, learn, tokenizer, sieve)
    size = sum(n for _, n in rows)
    _add_shard(folder, about, [row for row, _ in rows], done + len(batch), size, dict(sieve.dropped))
    drop_parts(folder, done + len(batch))
    _check_hope(about, sieve, folder)
    return about


def _identity(teacher: Any, source: Any, settings: WriteConfig, split: str, seed: int, new: int) -> dict[str, Any]:
    writes = {k: v for k, v in asdict(settings).items() if k not in ("share", "shard")}
    return {
        "version": VERSION,
        "teacher": checkpoint_fingerprint(teacher.path),
        "prompts": {"source": str(source), "split": split},
        "settings": writes | {"new_tokens": new, "seed": seed},
    }


def _begin(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """writing.json of a new folder, or of the unfinished one that is there."""
    if (folder / MANIFEST).exists():
        try:
            about = json.loads((folder / MANIFEST).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / MANIFEST} cannot be read: {error}; choose another folder") from error
        changed = next((n for n, v in identity.items() if about.get(n) != v), None)
        if changed is not None:
            raise UserError(
                f"{folder} holds text written with other {changed} ({about.get(changed)}, now {identity[changed]}); choose another folder"
            )
        return about
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no {MANIFEST}; choose another folder")
    about = identity | {"shards": []}
    atomic_write(folder / MANIFEST, json.dumps(about, indent=1))
    return about


def _check_shards(folder: Path, about: dict[str, Any], sieve: Sieve) -> None:
    """Compare finished shards with their checksums and let the filters know what they kept."""
    for shard in about["shards"]:
        try:
            data = (folder / shard["file"]).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / shard['file']} cannot be read: {error.strerror}; choose another folder"
            ) from error
        if xxhash.xxh3_64_hexdigest(data) != shard["xxh3"]:
            raise UserError(f"{folder / shard['file']} is damaged (its checksum differs); choose another folder")
        for line in gzip.decompress(data).decode().splitlines():
            sieve.remember(_completion_of(json.loads(line)))
    if about["shards"]:
        sieve.dropped = Counter(about["shards"][-1]["dropped"])


def _completion_of(record: dict[str, Any]) -> str:
    if "messages" in record:
        return record["messages"][-1]["content"]
    return record.get("completion") or record["text"][record["prompt_characters"] :]


def _endless(
    source: Any, tokenizer: Any, split: str, seed: int, prompt_tokens: int, stride: int, again: bool
) -> Iterator[Prompt]:
    """All prompts, and all of them again where another draw gives another text."""
    while True:
        yield from read_prompts(source, tokenizer, split, seed, prompt_tokens, stride)
        if not again:
            return


def _records(
    prompts: list[Prompt], answers: list[Completion], first: int, learn_prompt: bool, tokenizer: Any, sieve: Sieve
) -> list[tuple[dict[str, Any], int]]:
    """(record, tokens) of every text that the filters keep."""
    found = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = written(prompt, answer.ids, tokenizer)
        if not sieve.keeps(prompt.text, text, len(answer.ids), answer.nll):
            continue
        record = as_record(prompt, text, learn_prompt)
        record |= {"nll": round(answer.nll, 4), "stopped": answer.stopped, "number": first + i}
        found.append((record, len(prompt.ids) + len(answer.ids) + 1))
    return found


def written(prompt: Prompt, ids: list[int], tokenizer: Any) -> str:
    """The text that `ids` add to a prompt's; decoded together, since a tokenizer may drop a leading space."""
    whole = tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)
    before = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, skip_special_tokens=True)


def as_record(prompt: Prompt, text: str, learn_prompt: bool) -> dict[str, Any]:
    """What `--data` reads: a conversation with its answer; else prompt and completion, or one text where both are learnt."""
    domain = {"domain": prompt.domain} if prompt.domain else {}
    if prompt.messages:
        return {"messages": [*prompt.messages, {"role": "assistant", "content": text.strip()}]} | domain
    if learn_prompt:
        return {"text": prompt.text + text, "prompt_characters": len(prompt.text)} | domain
    return {"prompt": prompt.text, "completion": text} | domain


def _add_shard(
    folder: Path, about: dict[str, Any], rows: list[Any], to: int, tokens: int, dropped: dict[str, int]
) -> None:
    data = gzip.compress("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(), mtime=0)
    name = f"train-{len(about['shards']):05d}.jsonl.gz"
    atomic_write(folder / name, data)
    start = about["shards"][-1]["to"] if about["shards"] else 0
    about["shards"].append(
        {"file": name, "from": start, "to": to, "texts": len(rows), "tokens": tokens, "dropped": dropped}
        | {"xxh3": xxhash.xxh3_64_hexdigest(data)}
    )
    atomic_write(folder / MANIFEST, json.dumps(about, indent=1))


def _check_hope(about: dict[str, Any], sieve: Sieve, folder: Path) -> None:
    """Stop when the filters drop nearly everything, instead of writing for ever."""
    asked, texts = about["shards"][-1]["to"], sum(s["texts"] for s in about["shards"])
    if texts < _HOPELESS * asked and (len(about["shards"]) > 1 or texts == 0):
        worst, count = sieve.dropped.most_common(1)[0]
        raise UserError(
            f"the filters kept {texts} of {asked} written texts ({count} dropped by {worst}); loosen that filter "
            f"(what was kept is in {folder})"
        )


def summary(folder: str | Path) -> dict[str, Any]:
    """texts, tokens, prompts and dropped (by reason) of a written folder."""
    shards = json.loads((Path(folder) / MANIFEST).read_text())["shards"]
    return {
        "texts": sum(s["texts"] for s in shards),
        "tokens": sum(s["tokens"] for s in shards),
        "prompts": shards[-1]["to"] if shards else 0,
        "dropped": shards[-1]["dropped"] if shards else {},
    }
