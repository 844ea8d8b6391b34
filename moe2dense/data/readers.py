"""Read records of local files, any one of them by its number, without a cache: what lies in the file now is what is read.

Every reader gives the records of files of one format in their order. Columns that hold no text are not read.
"""

import csv
import io
import json
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe2dense.data.counts import Unusable
from moe2dense.data.fields import FIELDS
from moe2dense.data.files import file_format, open_plain
from moe2dense.errors import UserError, first_line

_CHUNK = 2**24  # bytes that are searched for line ends at a time
_PASSAGE = 2000  # characters gathered into one passage of a plain .txt file
_IN_MEMORY = 2**26  # bytes of a parquet or .txt file that are held in memory; more is mapped from a temporary file
_ROWS = 4096  # of a temporary file that are written at once
_BOM = b"\xef\xbb\xbf"


class Records(Protocol):
    """The records of one or several files."""

    # what was decided about the file and should be said, or ""
    note: str

    def __len__(self) -> int: ...

    def record(self, index: int) -> dict[str, Any]:
        """Return one record. Raises Unusable where it cannot be parsed."""
        ...

    def where(self, index: int) -> str:
        """Return the file and line or number of a record."""
        ...


class JsonLines:
    """A file of one JSON object a line, found by the places of its lines; blank lines are no records."""

    note = ""

    def __init__(self, path: Path, file: IO[bytes]):
        self._path, self._file = path, file
        self._starts, self._ends, self._numbers = _lines(file)

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, index: int) -> dict[str, Any]:
        """Return one line's object."""
        start, end = int(self._starts[index]), int(self._ends[index])
        self._file.seek(start)
        line = self._file.read(end - start)
        return _as_record(_parsed(line.removeprefix(_BOM) if start == 0 else line))

    def where(self, index: int) -> str:
        """Return the file's name and the line's number, from 1."""
        return f"{self._path.name} line {self._numbers[index]}"


def _lines(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the lines that are not blank start and end, in bytes, and their numbers from 1."""
    ends, offset = [], 0
    file.seek(0)
    while chunk := file.read(_CHUNK):
        ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset)
        offset += len(chunk)
    stops = np.concatenate([*ends, [offset]]) if ends else np.zeros(0, np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]) if len(stops) else stops
    short = np.flatnonzero(stops - starts < 8)
    filled = np.ones(len(stops), bool)
    for i in short:
        file.seek(int(starts[i]))
        filled[i] = bool(file.read(int(stops[i] - starts[i])).removeprefix(_BOM).strip())
    return starts[filled], stops[filled], np.flatnonzero(filled) + 1


def _parsed(text: bytes | str) -> Any:
    """Return what JSON text holds. Raises Unusable."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it cannot be read as json ({first_line(error)})") from error


def _as_record(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unusable(f"it is no JSON object, but {type(value).__name__}")
    return value


class Listed:
    """Records of a list."""

    def __init__(self, records: Sequence[Any], places: Callable[[int], str], note: str = ""):
        self._records, self._places, self.note = records, places, note

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> dict[str, Any]:
        """Return one record."""
        return _as_record(self._records[index])

    def where(self, index: int) -> str:
        """Return the file's name and the record's place in it."""
        return self._places(index)


class ArrowTable:
    """The needed columns of a table; keys that a record lacks are not null in it, but absent."""

    note = ""

    def __init__(self, path: Path, table: pa.Table):
        self._path, self._table = path, table

    def __len__(self) -> int:
        return self._table.num_rows

    def record(self, index: int) -> dict[str, Any]:
        """Return one row."""
        return without_nulls(self._table.slice(index, 1).to_pylist()[0])

    def where(self, index: int) -> str:
        """Return the file's name and the row's number, from 1."""
        return f"{self._path.name} record {index + 1}"


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls inside its objects: a column of objects gives each the keys of all others."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


class Joined:
    """The records of several files, one after the other."""

    def __init__(self, parts: Sequence[Records]):
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.note = next((p.note for p in parts if p.note), "")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[Records, int]:
        part = bisect_right(self._starts.tolist(), index) - 1
        return self._parts[part], index - int(self._starts[part])

    def record(self, index: int) -> dict[str, Any]:
        """Return one record."""
        part, index = self._place(index)
        return part.record(index)

    def where(self, index: int) -> str:
        """Return the place of a record in its own file."""
        part, index = self._place(index)
        return part.where(index)


def _json(path: Path, file: IO[bytes]) -> Records:
    """Read a .json file: an array of objects, an object that holds one, or one object a line."""
    text = file.read().removeprefix(_BOM)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return JsonLines(path, file)
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        # {"data": [...]} holds records; {"messages": [...]} is one
        value = lists[0] if len(lists) == 1 and not FIELDS & value.keys() else [value]
    if not isinstance(value, list):
        raise UserError(f"data {path} cannot be read as json: it holds no list of records")
    return Listed(value, lambda i: f"{path.name} record {i + 1}")


def _csv(path: Path, file: IO[bytes]) -> Records:
    """Read the needed columns of a .csv or .tsv file with a header; empty cells are absent."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    separator = "\t" if ".tsv" in [s.lower() for s in path.suffixes] else ","
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=separator)
        names = [n for n in reader.fieldnames or () if n]
        needed = FIELDS & set(names)
        line = reader.line_num + 1
        for row in reader:
            values = {k: v for k, v in row.items() if k in needed and v}
            records.append(values or dict.fromkeys(names))
            lines.append(line)
            line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"data {path} cannot be read as csv: {first_line(error)}") from error
    return Listed(records, lambda i: f"{path.name} line {lines[i]}")


def _text(path: Path, file: IO[bytes]) -> Records:
    """Read a .txt file: paragraphs between blank lines, gathered into passages; without blank lines a document a line."""
    large = file.seek(0, io.SEEK_END) > _IN_MEMORY
    try:
        parted = _has_blank_lines(file)
        paragraphs = _paragraphs(_decoded(file))
        first = list(islice(paragraphs, 2)) if parted else []
        if len(first) > 1:
            note = f"{path.name}: paragraphs between blank lines, gathered into passages of {_PASSAGE} characters"
            passages = _numbered(_gathered(chain(first, paragraphs)))
            return _texts(path, "passage", passages, note, large)
        lines = _filled_lines(_decoded(file))
        records = _texts(path, "line", lines, "", large)
    except UnicodeDecodeError as error:
        raise UserError(f"data {path} cannot be read as text: {first_line(error)}; save it as UTF-8") from error
    if len(records) > 1:
        records.note = f"{path.name}: a document a line, for it has no blank line"
    return records


def _has_blank_lines(file: IO[bytes]) -> bool:
    """Return whether a blank line may stand in a file, whatever its line ends are; the whole file is never in memory."""
    file.seek(0)
    last = b""
    while chunk := file.read(_CHUNK):
        if any(ends in last + chunk for ends in (b"\n\n", b"\n\r\n", b"\r\r")):
            return True
        last = chunk[-2:]
    return False


def _decoded(file: IO[bytes]) -> Iterator[str]:
    """Yield a file's lines as text, their ends made "\\n"; the file stays open. Raises UnicodeDecodeError."""
    file.seek(0)
    text = io.TextIOWrapper(file, "utf-8-sig")
    yield from text
    text.detach()


def _paragraphs(text: Iterable[str]) -> Iterator[str]:
    """Yield what stands between blank lines, empty paragraphs left out, as `split("\n\n")` parts it."""
    rest = ""
    for line in text:
        rest += line
        if line != "\n" or not rest.endswith("\n\n"):
            continue
        if rest != "\n\n":
            yield rest[:-2]
        rest = ""
    if rest:
        yield rest


def _filled_lines(text: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank with their numbers from 1, as `str.splitlines` parts them."""
    lines = (part for line in text for part in line.splitlines())
    return ((n, line) for n, line in enumerate(lines, 1) if line.strip())


def _numbered(passages: Iterable[str]) -> Iterator[tuple[int, str]]:
    return enumerate(passages, 1)


def _texts(path: Path, unit: str, rows: Iterable[tuple[int, str]], note: str, large: bool) -> Listed:
    """Return texts with their numbers as records; where there are many, they lie in a temporary file that is mapped."""
    if not large:
        numbers, texts = [], []
        for number, text in rows:
            numbers.append(number)
            texts.append({"text": text})
        return Listed(texts, lambda i: f"{path.name} {unit} {numbers[i]}", note)
    table = _mapped_table(_row_batches(iter(rows)))
    return Listed(_Texts(table), lambda i: f"{path.name} {unit} {table['number'][i]}", note)


def _row_batches(rows: Iterator[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
    """Yield numbered texts as batches of a table."""
    while part := list(islice(rows, _ROWS)):
        yield pa.RecordBatch.from_pydict({"number": [n for n, _ in part], "text": [t for _, t in part]}, _TEXT_ROWS)


_TEXT_ROWS = pa.schema([("number", pa.int64()), ("text", pa.large_string())])


class _Texts(Sequence[dict[str, Any]]):
    """The texts of a table as records, each made when it is asked for."""

    def __init__(self, table: pa.Table):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return {"text": self._table["text"][index].as_py()}


def _mapped_table(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Return batches of rows as a table that is mapped from a temporary file; there is at least one batch."""
    with tempfile.NamedTemporaryFile() as place:  # the mapping outlives the name
        rest = iter(batches)
        first = next(rest)
        with pa.ipc.new_file(place.name, first.schema) as writer:
            for batch in chain([first], rest):
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(place.name)).read_all()


def _gathered(paragraphs: Iterable[str]) -> Iterator[str]:
    """Gather consecutive paragraphs into passages, so that a block of plain text keeps its context."""
    part: list[str] = []
    size = 0
    for paragraph in paragraphs:
        part.append(paragraph)
        size += len(paragraph)
        if size >= _PASSAGE:
            yield "\n\n".join(part)
            part, size = [], 0
    if part:
        yield "\n\n".join(part)


def _parquet(path: Path, file: IO[bytes]) -> Records:
    """Read the needed columns of a .parquet file; large ones by way of a temporary file, mapped into memory."""
    source = pq.ParquetFile(file)
    names = source.schema_arrow.names
    columns = [n for n in names if n in FIELDS] or names[:8]
    groups = source.metadata
    if sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)) <= _IN_MEMORY:
        return ArrowTable(path, source.read(columns=columns))
    return ArrowTable(path, _mapped_table(source.iter_batches(columns=columns)))


def _arrow(path: Path, file: IO[bytes]) -> Records:
    """Read the needed columns of a .arrow file, as `datasets` saves it (a stream) or as Arrow does (a file)."""
    start = file.read(6)
    file.seek(0)
    source = pa.memory_map(str(path)) if path.suffix == ".arrow" else file
    table = pa.ipc.open_file(source).read_all() if start == b"ARROW1" else pa.ipc.open_stream(source).read_all()
    return ArrowTable(path, table.select([n for n in table.column_names if n in FIELDS] or table.column_names[:8]))


_READERS: dict[str, Callable[[Path, IO[bytes]], Records]] = {
    "json lines": JsonLines, "json": _json, "csv": _csv, "text": _text, "parquet": _parquet, "arrow": _arrow,
}  # fmt: skip


def read_records(files: Sequence[Path]) -> Records:
    """Return the records of files of one format. Raises UserError where a file cannot be read."""
    parts: list[Records] = []
    for path in files:
        kind = file_format(path)
        assert kind is not None, "files are chosen by their format"
        try:
            parts.append(_READERS[kind](path, open_plain(path)))
        except (OSError, pa.ArrowException, MemoryError) as error:
            raise UserError(f"data {path} cannot be read as {kind}: {first_line(error)}") from error
    return parts[0] if len(parts) == 1 else Joined(parts)
