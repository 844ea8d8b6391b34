"""Other dense checkpoints to compare with: a pretrained sibling of the teacher, an earlier student."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe2dense.data.vocabulary import compare_vocabularies
from moe2dense.errors import UserError, first_line
from moe2dense.families.download import download_model
from moe2dense.student.open import open_student

RESERVED = ("teacher", "student", "before", "last", "control")  # rows that a report has of its own
PLAIN = ("model", "final", *RESERVED)  # folders whose name says nothing
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check_baselines(names: Sequence[str], tokenizer: PreTrainedTokenizerBase, argument: str = "--baseline") -> None:
    """Refuse baselines that are missing or have other tokens than the teacher, before anything is computed.

    `tokenizer` is the teacher's. Raises UserError naming `argument` and the baseline at fault.
    """
    for name in names:
        folder = _folder(name, argument)
        own = _tokenizer(folder, argument)
        if own is not None and not compare_vocabularies(tokenizer, own).same:
            raise UserError(
                f"{argument} {name} has another tokenizer than the teacher ({len(own)} tokens, the teacher {len(tokenizer)}), so "
                f"their predictions cannot be compared token by token; give a checkpoint with the teacher's tokenizer"
            )


def open_baseline(name: str) -> PreTrainedModel:
    """Load a baseline as a transformers model in fp32. Raises UserError when it cannot be read."""
    return open_student(str(_folder(name, "--baseline"))).model


def row_names(names: Sequence[str]) -> dict[str, str]:
    """Return {row of the report: baseline as given}: the last part of a path, or two, where that names only one of them."""
    short = ["/".join(Path(n).parts[-2 if Path(n).name in PLAIN else -1 :]) or n for n in names]
    return {
        (s if short.count(s) == 1 and s not in RESERVED else f"{n} (baseline)"): n
        for s, n in zip(short, names, strict=True)
    }


def _folder(name: str, argument: str) -> Path:
    """Return where a baseline is, downloaded from the hub if need be."""
    if Path(name).exists():
        return Path(name)
    if name.count("/") != 1:
        raise UserError(
            f"{argument} {name} is no folder and no hub id (owner/name); give the folder of a dense checkpoint"
        )
    try:
        return download_model(name)
    except Exception as error:  # the hub client raises many kinds; all mean that the files are not to be had
        raise UserError(
            f"{argument} {name} is no folder, and cannot be had from the hub ({first_line(error)})"
        ) from error


def _tokenizer(folder: Path, argument: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer in a checkpoint's folder; None where it has none (a student in its run's folder)."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways
        raise UserError(f"{argument} {folder}: its tokenizer cannot be loaded ({type(error).__name__})") from error
