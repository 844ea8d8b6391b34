"""Count what a reader made of its records: read, used, and skipped with the first reason and where it stands."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class Unusable(Exception):
    """One record cannot be used; its text is the reason. Readers count it and go on with the next record."""


def _place(where: str) -> tuple[str, int]:
    """Return `train.jsonl line 61` as what sorts as the records stand in their files."""
    name, _, number = where.rpartition(" ")
    return (name, int(number)) if number.isdigit() else (where, 0)


@dataclass
class TextCounts:
    """How many records of a source were read and used, and why others were not.

    Fewer are read than there are where enough tokens were found before the end. reasons: why records were skipped, and how
    often. first: where the first record of each reason stands. notes: what else was done, and how often.
    """

    used: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """Return how many records were looked at."""
        return self.used + self.skipped

    @property
    def skipped(self) -> int:
        """Return how many records were not used."""
        return self.reasons.total()

    def skip(self, where: str, reason: str) -> None:
        """Count a record that is not used; where: its file and line."""
        reason = reason.encode(
            errors="backslashreplace"
        ).decode()  # a reason quotes the record, which may hold half a character
        self.reasons[reason] += 1
        if reason not in self.first or _place(where) < _place(self.first[reason]):  # records come in a shuffled order
            self.first[reason] = where

    def add(self, other: "TextCounts") -> None:
        """Take in the counts of another source."""
        self.used += other.used
        self.reasons.update(other.reasons)
        self.notes.update(other.notes)
        self.first = other.first | self.first

    def sentence(self) -> str:
        """Return `60 of 260 records read are used; 200 skipped, first train.jsonl line 61: ...` and the notes."""
        parts = [f"{self.used} of {self.read} records read {'is' if self.used == 1 else 'are'} used"]
        if self.reasons:
            reason = self.reasons.most_common(1)[0][0]
            more = len(self.reasons) - 1
            others = f" (and {more} other {'reason' if more == 1 else 'reasons'})" if more else ""
            parts.append(f"{self.skipped} skipped, first {self.first[reason]}: {reason}{others}")
        parts += [note if count == 1 else f"{note} ({count} times)" for note, count in self.notes.items()]
        return "; ".join(parts)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TextCounts":
        """Return the counts that `to_dict` gave."""
        reasons = values["reasons"]
        by_reason = Counter({r["reason"]: r["count"] for r in reasons})
        return cls(values["used"], by_reason, {r["reason"]: r["first"] for r in reasons}, Counter(values["notes"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON: {"read", "used", "skipped", "reasons": [{"reason", "count", "first"}], "notes"}."""
        reasons = [{"reason": r, "count": n, "first": self.first[r]} for r, n in self.reasons.most_common()]
        return {
            "read": self.read,
            "used": self.used,
            "skipped": self.skipped,
            "reasons": reasons,
            "notes": dict(self.notes),
        }
