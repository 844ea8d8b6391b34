"""Copy what an export takes from the teacher's folder unchanged: tokenizer, generation defaults and license."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe2dense.common.files import refuse_outside_links
from moe2dense.errors import UserError, first_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*",
)  # fmt: skip
LEGAL_FILES = ("LICENSE*", "NOTICE*")


def load_tokenizer(
    source: str | Path | PreTrainedTokenizerBase, remedy: str = "pass --tokenizer"
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, hub id or object. Raises UserError, ending in the remedy, when there is none."""
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"tokenizer: none can be loaded from {source} ({first_line(error)}); {remedy}") from error


def source_folder(source: str | Path | PreTrainedTokenizerBase) -> Path | None:
    """Return the local folder whose files can be copied, or None when the tokenizer must be saved from memory."""
    place = source.name_or_path if isinstance(source, PreTrainedTokenizerBase) else str(source)
    return Path(place) if place and Path(place).is_dir() else None


def write_tokenizer(
    source: str | Path | PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Copy the tokenizer's own files into `folder`; one that lives in memory or on the hub is saved by transformers."""
    origin = None if isinstance(source, PreTrainedTokenizerBase) else source_folder(source)
    if origin is None:
        tokenizer.save_pretrained(folder)
        return
    copy_files(origin, folder, TOKENIZER_FILES)


def copy_files(origin: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `origin` that match, keeping their relative paths. Raises UserError for links that lead out of it."""
    refuse_outside_links(origin)
    for pattern in patterns:
        for path in sorted(origin.glob(pattern)):
            if path.is_file():
                target = folder / path.relative_to(origin)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def teacher_license(origin: Path | None) -> dict[str, Any]:
    """Return license, license_name and license_link as the teacher's model card states them; {} when it does not."""
    if origin is None or not (origin / "README.md").is_file():
        return {}
    try:
        data = ModelCard.load(origin / "README.md", ignore_metadata_errors=True).data.to_dict()
    except ValueError:
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def generation_defaults(origin: Path | None) -> dict[str, Any] | None:
    """Return the teacher's generation_config.json as it stands, or None."""
    path = origin / "generation_config.json" if origin else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not valid JSON: {error}") from error
