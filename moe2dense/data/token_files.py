"""The tokens of a text in flat files, appended to as it is read, and mapped when it is used.

text.json          what is whole: tokens, documents, where reading goes on, the records that were skipped
ids.bin owners.bin learnt.bin prefix.bin calls.bin real.bin    one number a token
documents.bin      three numbers a document; works.jsonl: the names of its works
works.bin          the number of each token's work, written when it is first asked for
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe2dense.common.files import atomic_write, content_errors, place_errors, read_json_object, whole_file
from moe2dense.data.counts import TextCounts
from moe2dense.data.mapped import mapped_file
from moe2dense.data.token_text import DOCUMENTS, TOKEN_COLUMNS, Numbering, TokenText, numbering_state
from moe2dense.errors import UserError

VERSION = 1
STATE, WORKS = "text.json", "works.jsonl"
_CHUNK = 2**22  # tokens of a column that are derived at once
_DTYPES = {"i": torch.int32, "B": torch.uint8}


@dataclass
class TextState:
    """How far a text is tokenised. position: records taken of the source; finished: whether that was all of it."""

    numbering: Numbering = field(default_factory=Numbering)
    position: int = 0
    finished: bool = False
    counts: TextCounts = field(default_factory=TextCounts)


class TokenFiles:
    """The columns of one text in `folder`, whose fingerprint says which text it is, read how."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self._works_written = 0

    def _path(self, column: str) -> Path:
        return self.folder / f"{column}.bin"

    def begin(self) -> TextState:
        """Return how far the text is, files cut to that. Raises UserError where they are damaged or the place cannot be written."""
        with place_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        state = TextState()
        if (self.folder / STATE).is_file():
            saved = read_json_object(self.folder / STATE, self._remedy)
            with content_errors(self.folder / STATE, self._remedy):
                if (saved["version"], saved["fingerprint"]) != (VERSION, self.fingerprint):
                    raise ValueError("it is of another text")
                state = self._restored(saved)
        self._works_written = len(state.numbering.works)
        for column, kind in _columns():
            size = _count(state.numbering, column) * (4 if kind == "i" else 1)
            with place_errors(self.folder), open(self._path(column), "ab") as file:
                if file.tell() < size:
                    raise UserError(f"{self._path(column)} is shorter than it was written; {self._remedy}")
                file.truncate(size)
        return state

    @property
    def _remedy(self) -> str:
        return f"remove {self.folder}; the text is then tokenised again"

    def _restored(self, saved: dict[str, Any]) -> TextState:
        numbers = saved["numbering"]
        names = (self.folder / WORKS).read_text().splitlines()[: numbers["works"]] if numbers["works"] else []
        works = dict(json.loads(line) for line in names)
        domains = {name: i for i, name in enumerate(numbers["domains"])}
        numbering = Numbering(numbers["documents"], numbers["tokens"], numbers["next_work"], domains, works)
        if len(works) != numbers["works"]:
            raise ValueError(f"{WORKS} holds {len(works)} works of {numbers['works']}")
        return TextState(numbering, saved["position"], saved["finished"], TextCounts.from_dict(saved["counts"]))

    def append(self, columns: dict[str, bytes], state: TextState) -> None:
        """Write columns at the end of the files, then what is whole now; all of it is on disk afterwards."""
        with place_errors(self.folder):
            for column, _ in _columns():
                _append(self._path(column), columns[column])
            new = list(state.numbering.works.items())[self._works_written :]
            lines = "".join(json.dumps(item) + "\n" for item in new)
            kept = (self.folder / WORKS).read_text().splitlines(keepends=True) if new and self._works_written else []
            if new and len(kept) > self._works_written:  # names of a process that was killed before it had written all
                atomic_write(self.folder / WORKS, "".join(kept[: self._works_written]) + lines)
            elif new:
                _append(self.folder / WORKS, lines.encode(), fresh=not self._works_written)
            self._works_written = len(state.numbering.works)
        values = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "position": state.position,
            "finished": state.finished,
            "numbering": numbering_state(state.numbering),
            "counts": state.counts.to_dict(),
        }
        atomic_write(self.folder / STATE, json.dumps(values) + "\n")

    def text(self, state: TextState, tokens: int | None = None) -> TokenText:
        """Return the text, mapped. tokens: how many of them will be used; all by default."""
        columns = {
            column: mapped_file(self._path(column), _DTYPES[kind], _count(state.numbering, column))
            for column, kind in _columns()
        }
        text = TokenText(columns, list(state.numbering.domains), self.folder)
        count = len(text) if tokens is None else min(tokens, len(text))
        if not text.has_works(count):
            return text
        return TokenText(columns, text.domains, self.folder, self._works_column(text, count))

    def _works_column(self, text: TokenText, tokens: int) -> torch.Tensor:
        """Return the number of each token's work [T], from a file that is written where it is not there."""
        path = self._path("works")
        if not path.is_file() or path.stat().st_size < 4 * tokens:
            work_of = text.columns[DOCUMENTS].view(-1, 3)[:, 1].numpy()
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                for start in range(0, tokens, _CHUNK):
                    owners = text.columns["owners"][start : min(start + _CHUNK, tokens)].numpy()
                    file.write(np.ascontiguousarray(work_of[owners]).tobytes())
        return mapped_file(path, torch.int32, tokens)


def _columns() -> list[tuple[str, str]]:
    """Return the columns and their types in `array`."""
    return [*TOKEN_COLUMNS.items(), (DOCUMENTS, "i")]


def _count(numbering: Numbering, column: str) -> int:
    """Return how many numbers a column has."""
    return 3 * numbering.documents if column == DOCUMENTS else numbering.tokens


def _append(path: Path, data: bytes, fresh: bool = False) -> None:
    with open(path, "wb" if fresh else "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
