"""Pictures: validation metric against steps and time, where a step's time goes, profiles.

Methods are told apart by line style and marker as well as by colour, and named beside their curves;
grey is for targets and grids only. Files are written whole or not at all; no display is needed.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from steps_to_target.errors import CompareError
from steps_to_target.model import Run
from steps_to_target.output.export import write_atomically
from steps_to_target.output.panels import (
    MARKERS,
    curves_panel,
    label_text,
    style_of,
    time_panel,
    title_text,
)
from steps_to_target.scoring import Profile
from steps_to_target.summary import by_table

SUFFIXES = ("png", "svg", "pdf")
_HOURS_FROM = 7200.0
_PANEL = (5.4, 3.9)
_SMALL_PANEL = (3.7, 2.9)
# More tables than this are drawn as small multiples, this many panels in a row.
_MOST_ROWS = 3
_SMALL_COLUMNS = 4
_MOST_LABELS = 8


def _unit(runs: Sequence[Run]) -> tuple[float, str]:
    longest = max(
        (float(np.nanmax(run.seconds)) for run in runs if np.isfinite(run.seconds).any()),
        default=0.0,
    )
    return (3600.0, "hours") if longest >= _HOURS_FROM else (1.0, "seconds")


def _metric_name(runs: Sequence[Run]) -> str:
    return next((run.target.column for run in runs if run.target), "validation metric")


def table_figure(table: str, runs: Sequence[Run], methods: Sequence[str]) -> Figure:
    """All pictures of one table side by side.

    Args:
        table: its name.
        runs: its runs.
        methods: those of all tables, since a method keeps its look.
    """
    return _figure({table: list(runs)}, methods)


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _figure(tables: dict[str, list[Run]], everyone: Sequence[str]) -> Figure:
    """A row of panels for each table, or small multiples where there are many tables."""
    looks = {method: index for index, method in enumerate(everyone)}
    small = len(tables) > _MOST_ROWS
    timed = not small and any(run.time_parts for runs in tables.values() for run in runs)
    size = _SMALL_PANEL if small else _PANEL
    columns = _SMALL_COLUMNS if small else 2 + timed
    rows = math.ceil(2 * len(tables) / columns) if small else len(tables)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    # Beside the curves there is room for few names, and in small panels for none.
    named = not small and all(len(_by_method(runs)) <= _MOST_LABELS for runs in tables.values())
    for table, runs in tables.items():
        methods = _by_method(runs)
        unit, unit_name = _unit(runs)
        for against, scale in (("steps", 1.0), ("seconds", unit)):
            axes = panels.pop(0)
            curves_panel(axes, methods, looks, against, scale, named)
            axes.set_xlabel("steps" if against == "steps" else f"submission time ({unit_name})")
            axes.set_ylabel(
                title_text(_metric_name(runs), 2 * size[1]), fontsize=8 if small else 10
            )
            axes.set_title(title_text(table, size[0]), fontsize=10)
            axes.grid(True, color="0.9", linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(4 if small else 6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        if timed:
            axes = panels.pop(0)
            if any(run.time_parts for run in runs):
                time_panel(axes, methods)
            else:
                axes.set_axis_off()
    for axes in panels:
        axes.set_axis_off()
    if not named:
        _legend(figure, looks)
    return figure


def _legend(figure: Figure, looks: dict[str, int]) -> None:
    """One legend below all panels."""
    lines = [
        Line2D(
            [],
            [],
            label=label_text(method),
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor="white",
            **style_of(index),
        )
        for method, index in looks.items()
    ]
    columns = max(1, int(figure.get_figwidth() / 2.7))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, fontsize=8)


def figure_bytes(figure: Figure, suffix: str = "png") -> bytes:
    """Render a figure.

    Args:
        figure: what to draw.
        suffix: one of ``SUFFIXES``.
    """
    stream = io.BytesIO()
    # No date and no version: the same runs give the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(
        suffix, {"Software": None}
    )
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format=suffix, dpi=130, metadata=metadata)
    return stream.getvalue()


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    return write_atomically(path, figure_bytes(figure, _suffix(path)))


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in SUFFIXES:
        raise CompareError(f"{os.fspath(path)}: a picture's name ends in .png, .svg or .pdf")
    return suffix


def plot_runs(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write the pictures of all workloads and targets into one file.

    Thin lines are single runs; the thick line and the band are mean and standard error over
    repetitions (the number beside the name) on the stretch that all of them cover; open marks are
    the first evaluations that met the target (dotted).

    Args:
        runs: from ``load_runs``.
        path: ends in .png, .svg or .pdf.

    Raises:
        CompareError: another ending, no runs, or the file cannot be written.
    """
    _suffix(path)
    if not runs:
        raise CompareError("no runs to draw")
    return _save(_figure(by_table(runs), sorted({run.method for run in runs})), path)


def profile_figure(profile: Profile) -> Figure:
    """Performance profile: fraction of workloads within a factor of the best method's time."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ordered = sorted(profile.scores, key=lambda name: -profile.scores[name])
    for index, method in enumerate(ordered):
        axes.step(
            profile.taus,
            profile.curves[method],
            where="post",
            label=label_text(f"{method} (score {profile.scores[method]:.3f})"),
            linewidth=1.8,
            **style_of(index),
        )
    axes.set_xlabel(f"factor of the best method's {profile.measure} to target")
    axes.set_ylabel("fraction of workloads")
    names = ", ".join(profile.workloads)
    axes.set_title(title_text(f"performance profile over {names}", 5.0), fontsize=10)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(True, color="0.9", linewidth=0.6)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_profile(profile: Profile, path: str | os.PathLike[str]) -> Path:
    """Write the performance profile as .png, .svg or .pdf."""
    return _save(profile_figure(profile), path)
