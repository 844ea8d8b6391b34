"""Choose the text of a run that names none, by what its teacher was made for.

A teacher that was tuned to chat, write code or solve problems is not taught by web text alone. A card or the teacher's folder may name
other text (`defaults`, moe2dense.toml).
"""

import re

from moe2dense.config.schema import DEFAULT_CORPUS

# parts of names that say what a checkpoint was made for; the first that a name has counts
_KINDS = {
    "code": re.compile(r"(?<![a-z])(coder?|codestral|devstral|starcoder)(?![a-z])"),
    "math": re.compile(r"(?<![a-z])(math|prover)(?![a-z])"),
    "chat": re.compile(r"(?<![a-z])(instruct|chat|it|thinking|reasoning|sft|dpo|r1|gpt-oss)(?![a-z])"),
}
_CHATS = "HuggingFaceTB/smoltalk"
# public data sets with an open license, as `--data` takes them: hub id, its configuration, its weight
CORPORA = {
    "general": DEFAULT_CORPUS,
    "chat": f"{_CHATS}:all=0.8,{DEFAULT_CORPUS}=0.2",
    "code": f"{_CHATS}:self-oss-instruct=0.5,{_CHATS}:all=0.3,{DEFAULT_CORPUS}=0.2",
    "math": f"{_CHATS}:numina-cot-100k=0.4,HuggingFaceTB/finemath:finemath-4plus=0.4,{DEFAULT_CORPUS}=0.2",
}


def text_kind(name: str) -> str:
    """Return what a checkpoint was made for, by its name or hub id: code, math or chat; general where the name says nothing."""
    own = name.rpartition("/")[2].lower()
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(own)), "general")


def default_text(name: str) -> str:
    """Return the text for a teacher of this name, as `--data` takes it."""
    return CORPORA[text_kind(name)]


def kind_of_text(path: str) -> str:
    """Return the kind of teachers that a text is the default of, "" for any other text."""
    return next((kind for kind, text in CORPORA.items() if text == path), "")
