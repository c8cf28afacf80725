"""Pictures for the results page: small PNG files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickstart.errors import writing

COLOURS = {"expand": "#1f77b4", "reduce": "#d62728"}
DPI = 90


def figure(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], made without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )


def save(picture: Any, path: Path) -> None:
    """Writes a figure and closes it."""
    from matplotlib import pyplot

    with writing(path) as temporary:
        picture.savefig(temporary, format="png", dpi=DPI)
    pyplot.close(picture)
