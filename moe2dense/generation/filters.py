"""Which written texts are kept: by length, the teacher's likelihood, script, and likeness to texts kept before."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import xxhash

from moe2dense.errors import UserError

_WORD = re.compile(r"\w+")
_GRAM = 5  # words


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK, ...: the first word of a letter's Unicode name."""
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]


def script_of(text: str) -> str:
    """The script most letters of a text are of, '' without letters. It tells alphabets apart, not languages that share one."""
    counts = Counter(_script(c) for c in text if c.isalpha())
    return counts.most_common(1)[0][0] if counts else ""


def grams(text: str) -> frozenset[int]:
    """Hashes of a text's five-word sequences, lower case; of its words where it has fewer than five."""
    words = _WORD.findall(text.lower())
    size = min(_GRAM, max(1, len(words)))
    return frozenset(
        xxhash.xxh3_64_intdigest(" ".join(words[i : i + size]).encode()) for i in range(max(0, len(words) - size + 1))
    )


class NearDuplicates:
    """Texts seen so far, by their five-word sequences. Exact Jaccard similarity, through an index of the sequences."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._sizes: list[int] = []
        self._index: dict[int, list[int]] = {}

    def similarity(self, found: frozenset[int]) -> float:
        """The largest Jaccard similarity of these sequences with those of a text added before."""
        shared: Counter[int] = Counter()
        for gram in found:
            shared.update(self._index.get(gram, ()))
        return max((n / (len(found) + self._sizes[i] - n) for i, n in shared.items()), default=0.0)

    def add(self, text: str) -> bool:
        """Add a text unless it is a near-duplicate; whether it was added."""
        found = grams(text)
        if self.similarity(found) >= self.threshold:
            return False
        for gram in found:
            self._index.setdefault(gram, []).append(len(self._sizes))
        self._sizes.append(len(found))
        return True


@dataclass(frozen=True)
class Filters:
    """min_tokens written; nll: band of the teacher's mean nats per written token; duplicates: Jaccard similarity of five-word
    sequences from which a text is dropped (0 = none is); same_script: a text's letters must be of its prompt's script.
    """

    min_tokens: int = 1
    nll: tuple[float, float] | None = None
    duplicates: float = 0.0
    same_script: bool = False


def parse_band(text: str) -> tuple[float, float] | None:
    """`2.5:4` -> (2.5, 4.0); '' -> None. Raises UserError."""
    if not text:
        return None
    low, colon, high = text.partition(":")
    try:
        band = float(low or 0), float(high or "inf")
    except ValueError:
        band = (1.0, 0.0)
    if not colon or not 0 <= band[0] < band[1]:
        raise UserError(f"nll must be LOW:HIGH in nats per token, such as 2.5:4; found {text!r}")
    return band


@dataclass
class Sieve:
    """Applies the filters to one text after another; `dropped` counts by reason."""

    filters: Filters
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._seen = NearDuplicates(self.filters.duplicates) if self.filters.duplicates else None

    def keeps(self, prompt: str, completion: str, tokens: int, nll: float) -> bool:
        """Whether a text of so many written tokens is kept."""
        reason = self._reason(prompt, completion, tokens, nll)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def remember(self, completion: str) -> None:
        """A text that was kept earlier, by a run that is being continued."""
        if self._seen is not None:
            self._seen.add(completion)

    def _reason(self, prompt: str, completion: str, tokens: int, nll: float) -> str:
        f = self.filters
        if tokens < f.min_tokens or not completion.strip():
            return "min_tokens"
        if f.nll is not None and not f.nll[0] <= nll <= f.nll[1]:
            return "nll"
        if f.same_script and script_of(prompt) and script_of(completion) not in ("", script_of(prompt)):
            return "same_script"
        if self._seen is not None and not self._seen.add(completion):
            return "duplicates"
        return ""
