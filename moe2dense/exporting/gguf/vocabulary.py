"""Turn a tokenizer into what GGUF holds: tokens, kinds, merges or scores, and the name of the rule that splits text.

llama.cpp knows splitting rules by name only, so each rule's split of sample text is compared with the tokenizer's own. A tokenizer that no rule reproduces is refused: a file with the wrong rule loads and is wrong.
"""

import json
from dataclasses import dataclass
from typing import Any

import regex
from transformers import PreTrainedTokenizerBase

from moe2dense.data.vocabulary import check_vocabulary
from moe2dense.errors import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?" + _UPPER.replace("{", "{{").replace("}", "}}") + "*"
    + _LOWER.replace("{", "{{").replace("}", "}}") + "+{suffix}"
    r"|[^\r\n\p{{L}}\p{{N}}]?" + _UPPER.replace("{", "{{").replace("}", "}}") + "+"
    + _LOWER.replace("{", "{{").replace("}", "}}") + "*{suffix}"
    r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class SplitRule:
    """A rule of llama.cpp: text is cut by each pattern in turn, matches and what lies between them becoming pieces."""

    name: str
    patterns: tuple[str, ...]
    # whether a piece that is a token is taken whole
    ignore_merges: bool = False


RULES = (
    SplitRule("gpt-2", (_GPT2,)),
    SplitRule("starcoder", (r"\p{N}", _GPT2)),
    SplitRule("qwen2", (_WORDS.format(digits=""),)),
    SplitRule("dbrx", (_WORDS.format(digits="{1,3}"),)),
    SplitRule("llama-bpe", (_WORDS.format(digits="{1,3}"),), ignore_merges=True),
    SplitRule("tekken", (_CASED.format(suffix="", digits=""),), ignore_merges=True),
    SplitRule("gpt-4o", (_CASED.format(suffix=_CONTRACTION, digits="{1,3}"),)),
    SplitRule(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ),
)
_SAMPLES = (
    "Hello world, it's WE'LL don't THEY'RE I'd'Ve",
    "in 1987, 3.14159 and 12345678 or ½ x² 7",
    "a  b   c\t\td\n\n  e \r\n f\n   \n g  ",
    "x=f(y)[i]; // --> !!! ?? #hash @name $9.99 50%/year http://a.b/c_d?e=1&f",
    "naïve Café ÉCOLE élan e\u0301 हिन्दी русский ΑΒΓ δ iPhone McDonald camelCaseHTML",
    "漢字かな交じり文 カタカナ 한국어 中文，标点。 “quotes” — … 🙂🙂 👩‍👩‍👧",
    "\n\n\n", "   ", "'", "''s", "don’t", ".Net ,but (see) \"so\"/\n/next",
)  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """What the writer stores under tokenizer.ggml."""

    # gpt2 (byte-level BPE) or llama (sentencepiece BPE)
    model: str
    # name of the splitting rule
    pre: str
    tokens: list[bytes]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool | None
    add_bos: bool
    add_eos: bool
    # ids of bos, eos, unk and pad
    special: dict[str, int]
    chat_template: str | None


def _cut(text: str, patterns: tuple[str, ...]) -> list[tuple[int, int]]:
    pieces = [(0, len(text))] if text else []
    for pattern in patterns:
        spans = []
        for start, end in pieces:
            at = start
            for match in regex.finditer(pattern, text[start:end]):
                a, b = start + match.start(), start + match.end()
                if a == b:
                    continue
                spans += [(at, a)] * (at < a) + [(a, b)]
                at = b
            spans += [(at, end)] * (at < end)
        pieces = spans
    return pieces


def split_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of llama.cpp's rule that splits text as this byte-level tokenizer does. Raises UserError when none does."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    ignore_merges = bool(json.loads(backend.to_str())["model"].get("ignore_merges"))
    wanted = [[span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)] for text in _SAMPLES]
    for rule in RULES:
        if rule.ignore_merges == ignore_merges and all(
            _cut(text, rule.patterns) == spans for text, spans in zip(_SAMPLES, wanted, strict=True)
        ):
            return rule.name
    raise UserError(
        "tokenizer: it splits text in a way that GGUF has no name for, so a GGUF file would tokenize wrongly; export --format hf"
    )


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Return the vocabulary for a model whose embedding has `rows` rows; ids without a token are filled with unused ones.

    Raises UserError for what is neither byte-level BPE nor sentencepiece-like BPE with byte fallback.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("tokenizer: GGUF export needs a tokenizer.json; this tokenizer has none")
    check_vocabulary(tokenizer, rows, "tokenizer: it")
    table = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = table["model"]
    _check_normalizer(table, byte_level=not model.get("byte_fallback"))
    if model["type"] != "BPE":
        raise UserError(f"tokenizer: GGUF export knows BPE tokenizers, this one is {model['type']}; export --format hf")
    tokens, kinds = _tokens(tokenizer, table, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    first, last = _added_ends(tokenizer)
    shared: dict[str, Any] = dict(tokens=tokens, kinds=kinds, add_bos=first, add_eos=last, special=_special(tokenizer),
                  chat_template=_template(tokenizer))  # fmt: skip
    if model.get("byte_fallback"):
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        scores = _scores(pairs, tokenizer, rows)
        starts = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])  # type: ignore
        return Vocabulary("llama", "default", merges=[], scores=scores,
                          add_space_prefix=str(starts[0]).startswith("▁"), **shared)  # fmt: skip
    return Vocabulary("gpt2", split_rule(tokenizer), merges=merges, scores=[], add_space_prefix=None, **shared)


def _check_normalizer(table: dict[str, Any], byte_level: bool) -> None:
    normalizer = table.get("normalizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = {step["type"] for step in steps}
    # NFC leaves text that is composed already as it is; the other two are how sentencepiece marks spaces.
    if not kinds <= ({"NFC"} if byte_level else {"Prepend", "Replace"}):
        raise UserError(
            f"tokenizer: its normalizer ({', '.join(sorted(kinds))}) has no place in GGUF; export --format hf"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, table: dict[str, Any], rows: int) -> tuple[list[bytes], list[int]]:
    tokens = [f"[PAD{i}]".encode() for i in range(rows)]
    kinds = [UNUSED] * rows
    byte_fallback = bool(table["model"].get("byte_fallback"))
    for token, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = token.encode(), NORMAL
        if byte_fallback and regex.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[i] = BYTE
    for added in table["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if byte_fallback and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN  # type: ignore[index]
    return tokens, kinds


def _scores(pairs: list[list[str]], tokenizer: PreTrainedTokenizerBase, rows: int) -> list[float]:
    """Return sentencepiece scores: the earlier the merge that makes a token, the higher its score."""
    scores = [-1e6] * rows
    vocab = tokenizer.get_vocab()
    for rank, (left, right) in enumerate(pairs):
        i = vocab.get(left + right)
        if i is not None and scores[i] == -1e6:
            scores[i] = -float(rank)
    return scores


def _added_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    ids: Any = tokenizer("a")["input_ids"]
    return (
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    )


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: int(i) for name, i in ids.items() if i is not None}


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
