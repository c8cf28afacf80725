"""AlgoPerf's CSV files as frames of numbers, however damaged they are.

AlgoPerf rewrites the whole file on every call and not atomically, so a preempted run can leave an
empty file, a half-written last line or a truncated header. Nothing here raises on such input: what
can be read is returned and what cannot is counted. A file that was saved again in another dialect
(semicolons, decimal commas, thousands separators) is not guessed at: it is unreadable.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

STEP = "global_step"
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# "2,000", "0,25", "1'000", "1.234,5": digits that some spreadsheet wrote its own way.
_OTHER_NOTATION = re.compile(r"[-+]?\d[\d.]*[,'\u2019\u00a0\u202f ][\d.,'\u2019\u00a0\u202f ]*\d%?")


@dataclass
class Table:
    """Numbers of a log file and what was wrong with it.

    Attributes:
        frame: the wanted columns as float64, NaN for an empty cell or one that is no number.
        columns: all names in the header.
        words: columns whose cells are all words, such as "tensor(0.5)".
        damaged: lines left out because they were half-written or of the wrong length.
        problem: why the file cannot be used; empty when it can.
        unreadable: the problem is the file's form (not that it is missing or empty).
    """

    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    columns: tuple[str, ...] = ()
    words: set[str] = field(default_factory=set)
    damaged: int = 0
    problem: str = ""
    unreadable: bool = False


def number(text: object) -> float:
    """A cell as a number; NaN for an empty cell or one that is no number."""
    try:
        return float(str(text))
    except ValueError:
        return np.nan


def _torn(lines: list[str]) -> bool:
    """Whether the last line, which has no line end, stops in the middle of its last number."""
    *others, last = (line.rpartition(",")[2] for line in lines)
    lengths = [len(cell) for cell in others if cell]
    return bool(last) and bool(lengths) and len(last) < min(lengths)


def _whole_lines(lines: list[str], commas: int, ended: bool) -> list[str]:
    """The lines that have as many cells as the header; quoted ones are left to pandas."""
    whole = [
        line
        for line in lines
        if (line.count('"') % 2 == 0 if '"' in line else line.count(",") == commas)
    ]
    if whole and not ended and whole[-1] is lines[-1] and _torn(whole):
        whole.pop()
    return whole


def _numbers(name: str, cells: pd.Series) -> tuple[pd.Series, str]:
    """A column as float64, and what is wrong with its cells (empty: nothing)."""
    if cells.dtype.kind in "iuf":
        return cells.astype(np.float64), ""
    texts = [text.strip() for text in cells.dropna().map(str)]
    for text in texts:
        if text != name and _OTHER_NOTATION.fullmatch(text):
            return cells, f"has numbers in another notation ({text!r} in column {name})"
    return cells.map(number).astype(np.float64), ""


def _read_text(path: str | os.PathLike[str]) -> tuple[str, Table | None]:
    try:
        with open(path, "rb") as stream:
            text = stream.read().decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return "", Table(problem="missing")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        return "", Table(problem=reason, unreadable=True)
    return text.replace("\r\n", "\n").replace("\r", "\n"), None


def read_csv(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> Table:
    """Read a log file.

    Args:
        path: the file.
        wanted: which columns to turn into numbers (a log has many that are not needed).
    """
    text, failure = _read_text(path)
    if failure is not None:
        return failure
    # Blocks of zero bytes are what a crash leaves of a file that was allocated, but not written.
    header, *lines = [line for line in text.split("\n") if line.strip("\0 \t")] or [""]
    if not header:
        return Table(problem="empty")
    try:
        names = [name.strip() for name in next(csv.reader([header]))]
    except csv.Error:
        names = []
    if not any(names):
        return Table(problem="has no usable header", unreadable=True)
    if STEP not in names:
        others = [word for sign, word in _OTHER_SEPARATORS.items() if sign in header]
        form = f"is separated by {others[0]}, not by commas" if others else f"has no column {STEP}"
        return Table(columns=tuple(names), problem=form, unreadable=True)
    whole = _whole_lines(lines, header.count(","), text.endswith("\n"))
    cells = pd.read_csv(
        io.StringIO("\n".join(whole)),
        names=range(len(names)),
        usecols=[names.index(name) for name in dict.fromkeys(names) if wanted(name)],
        na_values=["", "nan", "NaN"],
        keep_default_na=False,
        index_col=False,
        on_bad_lines="skip",
        low_memory=False,
    )
    table = Table(columns=tuple(names), damaged=len(lines) - len(cells))
    if cells.empty and table.damaged and (table.damaged > 1 or text.endswith("\n")):
        table.problem, table.unreadable = "has no line with as many cells as its header", True
        return table
    columns = {}
    for position in cells:
        name = names[position]
        columns[name], table.problem = _numbers(name, cells[position])
        if columns[name].isna().all() and cells[position].notna().any():
            table.words.add(name)
        if table.problem:
            table.unreadable = True
            return table
    table.frame = pd.DataFrame(columns, dtype=np.float64)
    return table


def column(frame: pd.DataFrame, *names: str) -> pd.Series:
    """The first of the named columns, its gaps filled from the others; infinity counts as a gap."""
    values = pd.Series(np.nan, index=frame.index, dtype=np.float64)
    for name in names:
        if name in frame:
            values = values.fillna(frame[name].where(np.isfinite(frame[name])))
    return values
