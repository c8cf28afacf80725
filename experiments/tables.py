"""Tables that are shown on a screen and in Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass

import rich.table


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column is left-aligned, all others right-aligned."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row of '{self.title}' has {len(row)} cells: {row}")

    def for_screen(self) -> rich.table.Table:
        """A rich table."""
        table = rich.table.Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """The title in bold, and the table."""
        line = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [self.header, tuple(line), *self.rows]
        cells = "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in r) + " |" for r in rows)
        return f"**{self.title}**\n\n{cells}\n"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; the latter is NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, float("nan")
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, (variance / len(values)) ** 0.5


def plus_minus(values: list[float], digits: int = 3) -> str:
    """'mean ± s.e.', or the value alone."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if error != error else f"{mean:.{digits}f} ± {error:.{digits}f}"
