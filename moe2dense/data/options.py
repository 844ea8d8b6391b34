"""How text is read beyond its place: what begins a document, which turns of a chat are learnt, in which template."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moe2dense.errors import UserError

BOS_CHOICES = ("auto", "on", "off")
LEARN_CHOICES = ("all", "last", "no-reasoning")
FIT_CHOICES = ("cut", "whole")


@dataclass(frozen=True)
class TextOptions:
    """How documents are made of records.

    bos: whether a document begins with the tokenizer's BOS: auto = where the tokenizer puts one before a prompt. learn: which of the
    assistant's turns are learnt: all, the last, or all without their reasoning. chat_template: a file with a Jinja template, "" =
    the tokenizer's own. date: the day that templates are told, as 2026-11-28; "" = the day it is. fit: whether a chat is cut where a block
    ends, or begins in the next block where it is whole, and the rest of the block is padding.
    """

    bos: str = "auto"
    learn: str = "all"
    chat_template: str = ""
    date: str = ""
    fit: str = "cut"

    def __post_init__(self) -> None:
        kinds = (("bos", self.bos, BOS_CHOICES), ("learn", self.learn, LEARN_CHOICES), ("fit", self.fit, FIT_CHOICES))
        for name, value, choices in kinds:
            if value not in choices:
                raise UserError(f"data.{name} must be one of {', '.join(choices)}; found {value!r}")

    def template_text(self) -> str:
        """Return the text of the template file, "" where none is named. Raises UserError where it cannot be read."""
        if not self.chat_template:
            return ""
        try:
            return Path(self.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {self.chat_template} cannot be read: {error}") from error


DEFAULTS = TextOptions()


def document_prefix(tokenizer: PreTrainedTokenizerBase, bos: str = "auto") -> list[int]:
    """Return the tokens that a document of plain text begins with, [] for none. Raises UserError for `on` without a BOS.

    auto: those that the tokenizer itself puts before a text, a BOS as a rule.
    """
    if bos == "off":
        return []
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    whole = list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    prefix = whole[: starts[0]] if starts else []
    if bos == "on" and not prefix:
        if not isinstance(tokenizer.bos_token_id, int):
            raise UserError("data.bos on: the tokenizer has no BOS token (bos_token); leave it at auto")
        return [tokenizer.bos_token_id]
    return prefix
