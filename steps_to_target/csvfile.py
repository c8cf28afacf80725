"""Read AlgoPerf's CSV files, however damaged they are.

AlgoPerf rewrites the whole file on every call and not atomically, so a preempted run can leave an
empty file, a half-written last line or a truncated header. Nothing here raises on such input: what
can be read is returned, what cannot is counted.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

TAIL_BYTES = 8_192
_WHOLE_FILE_BYTES = 16_384

Row = dict[str, float]


@dataclass
class CsvTable:
    """Rows of numbers (a cell that is empty or no number is absent) and what was wrong.

    Attributes:
        columns: header of the file.
        rows: one dict per usable row, in file order.
        damaged: rows left out because they were half-written or of the wrong length.
        whole: False when only the end of a long file was read.
        problem: why nothing could be read; empty when something could.
    """

    columns: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    damaged: int = 0
    whole: bool = True
    problem: str = ""


def number(text: str) -> float | None:
    """A cell as a number; None for an empty cell or one that is no number; NaN stays NaN."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _lines(text: str) -> list[str]:
    # Only line feeds end a line: str.splitlines would also split at form feeds inside a cell.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip("\0 \t")]


def _cells(line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line]))
    except (csv.Error, StopIteration):
        return []


def _columns(lines: list[str], width: int) -> tuple[list[list[str]], int]:
    """Cells by column of the lines that have ``width`` cells, and how many lines that are."""
    if any('"' in line for line in lines):
        # Line by line, so that one unbalanced quote cannot swallow the rest of the file.
        rows = [row for row in map(_cells, lines) if len(row) == width]
        return [list(cells) for cells in zip(*rows, strict=True)], len(rows)
    whole = [line for line in lines if line.count(",") == width - 1]
    flat = ",".join(whole).split(",") if whole else []
    return [flat[index::width] for index in range(width)], len(whole)


def _is_torn(last_column: list[str]) -> bool:
    """Whether the last line, which has no line end, stops in the middle of its last number."""
    others = [len(cell) for cell in last_column[:-1] if cell]
    return bool(last_column[-1]) and bool(others) and len(last_column[-1]) < min(others)


def _numbers(cells: list[str]) -> list[float | None]:
    try:
        # At C speed in the usual cases: a full column, or one with empty cells.
        return (
            [float(cell) if cell else None for cell in cells]
            if "" in cells
            else [*map(float, cells)]
        )
    except ValueError:
        return [number(cell) for cell in cells]


def _to_rows(
    columns: tuple[str, ...], cells: list[list[str]], count: int, wanted: Callable[[str], bool]
) -> list[Row]:
    """Turn the wanted columns into numbers and put them together as ``count`` rows."""
    chosen = [index for index, name in enumerate(columns) if wanted(name)]
    if not count or not chosen:
        return [{} for _ in range(count)]
    kept = [columns[index] for index in chosen]
    values = [_numbers(cells[index]) for index in chosen]
    rows = zip(*values, strict=True)
    if any(None in column for column in values):
        return [
            {name: value for name, value in zip(kept, row, strict=True) if value is not None}
            for row in rows
        ]
    full = cast("list[tuple[float, ...]]", list(rows))
    return [dict(zip(kept, row, strict=True)) for row in full]


def read_csv(
    path: str | os.PathLike[str],
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    tail: bool = False,
) -> CsvTable:
    """Read a log file.

    Args:
        path: the file.
        wanted: which columns to turn into numbers (a log has many that are not needed).
        tail: for a long file read the header and the last ``TAIL_BYTES`` only.

    Returns:
        The table; ``problem`` is set when the file is missing, empty or cannot be opened.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if tail and size > _WHOLE_FILE_BYTES:
                header = stream.readline(TAIL_BYTES)
                stream.seek(size - TAIL_BYTES)
                stream.readline()
                data, whole = header + stream.read(), False
            else:
                data, whole = stream.read(), True
    except FileNotFoundError:
        return CsvTable(problem="missing")
    except OSError as error:
        return CsvTable(problem=f"cannot be read ({error.strerror or error})")
    text = data.decode("utf-8-sig", errors="replace")
    lines = _lines(text)
    if not lines:
        return CsvTable(problem="empty")
    columns = tuple(name.strip() for name in _cells(lines[0]))
    if not columns:
        return CsvTable(problem="has no usable header")
    body, width = lines[1:], len(columns)
    cells, count = _columns(body, width)
    damaged = len(body) - count
    complete = text.endswith(("\n", "\r"))
    if count and not complete and len(_cells(body[-1])) == width and _is_torn(cells[-1]):
        cells, count, damaged = [column[:-1] for column in cells], count - 1, damaged + 1
    rows = _to_rows(columns, cells, count, wanted)
    return CsvTable(columns, rows, damaged, whole)


def finite(row: Row, *names: str) -> float | None:
    """The first of the named cells that holds a finite number."""
    for name in names:
        value = row.get(name)
        if value is not None and math.isfinite(value):
            return value
    return None
