"""Filter written texts by length, the teacher's likelihood, script, and similarity to texts that passed before."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import xxhash

from moe2dense.errors import UserError

_WORD = re.compile(r"\w+")
_SEQUENCE_WORDS = 5


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """Return LATIN, CYRILLIC, CJK, ...: the first word of a letter's Unicode name."""
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]


def script_of(text: str) -> str:
    """Return the script of most letters of a text, "" without letters. It does not tell languages apart."""
    counts = Counter(_script(c) for c in text if c.isalpha())
    return counts.most_common(1)[0][0] if counts else ""


def word_sequences(text: str) -> frozenset[int]:
    """Return hashes of a text's five-word sequences in lower case; of all its words where it has fewer than five."""
    words = _WORD.findall(text.lower())
    size = min(_SEQUENCE_WORDS, max(1, len(words)))
    return frozenset(
        xxhash.xxh3_64_intdigest(" ".join(words[i : i + size]).encode()) for i in range(max(0, len(words) - size + 1))
    )


class NearDuplicates:
    """The texts added so far: exact Jaccard similarity through an index of their five-word sequences."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._sizes: list[int] = []
        self._index: dict[int, list[int]] = {}

    def similarity(self, sequences: frozenset[int]) -> float:
        """Return the largest Jaccard similarity of these sequences with those of a text added before."""
        shared: Counter[int] = Counter()
        for sequence in sequences:
            shared.update(self._index.get(sequence, ()))
        return max((n / (len(sequences) + self._sizes[i] - n) for i, n in shared.items()), default=0.0)

    def add(self, text: str) -> bool:
        """Add a text unless it is a near-duplicate; return whether it was added."""
        sequences = word_sequences(text)
        if self.similarity(sequences) >= self.threshold:
            return False
        for sequence in sequences:
            self._index.setdefault(sequence, []).append(len(self._sizes))
        self._sizes.append(len(sequences))
        return True


@dataclass(frozen=True)
class Filters:
    """What a text must satisfy.

    min_tokens: written, at least; nll: (low, high) of the teacher's mean nats per written token; duplicates: Jaccard
    similarity of five-word sequences from which a text is dropped, 0 drops none; same_script: most of its letters are of its
    prompt's script.
    """

    min_tokens: int = 1
    nll: tuple[float, float] | None = None
    duplicates: float = 0.0
    same_script: bool = False


def parse_band(text: str) -> tuple[float, float] | None:
    """Return the band that `2.5:4` means, (2.5, 4.0), and None for "". Raises UserError for anything else."""
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
        self._earlier = NearDuplicates(self.filters.duplicates) if self.filters.duplicates else None

    def keeps(self, prompt: str, completion: str, tokens: int, nll: float) -> bool:
        """Return whether a text of so many written tokens passes, and count it where it does not."""
        reason = self._reason(prompt, completion, tokens, nll)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def remember(self, completion: str) -> None:
        """Add a text that passed earlier, in a run that is being continued."""
        if self._earlier is not None:
            self._earlier.add(completion)

    def _reason(self, prompt: str, completion: str, tokens: int, nll: float) -> str:
        """Return the filter that drops a text; "" where none does."""
        f = self.filters
        if tokens < f.min_tokens or not completion.strip():
            return "min_tokens"
        if f.nll is not None and not f.nll[0] <= nll <= f.nll[1]:
            return "nll"
        if f.same_script and script_of(prompt) and script_of(completion) not in ("", script_of(prompt)):
            return "same_script"
        if self._earlier is not None and not self._earlier.add(completion):
            return "duplicates"
        return ""
