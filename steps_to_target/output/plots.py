"""Pictures: validation metric against steps and time, where a step's time goes, profiles.

Everything is told apart by line style, marker and hatching as well as by colour, so that the
pictures can be read in grey. Files are written whole or not at all; no display is needed.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from steps_to_target.errors import CompareError
from steps_to_target.output.export import write_atomically
from steps_to_target.model import TIME_PARTS, FloatArray, Run
from steps_to_target.scoring import Profile
from steps_to_target.summary import repetitions, representative

SUFFIXES = ("png", "svg", "pdf")
# Dark to light, so that the order survives in grey; hues from the colour-blind safe Okabe-Ito set.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
_GRID_POINTS = 200
_HOURS_FROM = 7200.0
_PANEL = (5.4, 3.9)


def _label(text: str) -> str:
    """Text that is shown as it is: no mathematics, and in the legend whatever it begins with."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _STYLES[(index + index // len(_COLOURS)) % len(_STYLES)],
    }


def mean_curve(
    curves: Sequence[tuple[FloatArray, FloatArray]],
) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Mean and standard error of curves on their common stretch, by linear interpolation.

    Args:
        curves: ``(x, y)`` pairs, x strictly increasing, shape ``(evaluations,)`` each.

    Returns:
        ``(x, mean, standard error)`` of shape ``(points,)``, or None when the curves have no
        stretch in common. The standard error is zero for a single curve.
    """
    usable = [(x, y) for x, y in curves if len(x) > 1]
    if not usable:
        return None
    start = max(float(x[0]) for x, _ in usable)
    end = min(float(x[-1]) for x, _ in usable)
    if not end > start:
        return None
    grid = np.linspace(start, end, _GRID_POINTS)
    stacked = np.stack([np.interp(grid, x, y) for x, y in usable])
    spread = np.zeros_like(grid)
    if len(usable) > 1:
        spread = stacked.std(axis=0, ddof=1) / math.sqrt(len(usable))
    return grid, stacked.mean(axis=0), spread


def _curve(run: Run, against: str, unit: float) -> tuple[FloatArray, FloatArray]:
    x = (run.steps if against == "steps" else run.seconds) / unit
    keep = np.isfinite(x) & np.isfinite(run.values)
    x, y = x[keep], run.values[keep]
    if len(x) > 1:
        # Time may stand still or run back after a resume; interpolation needs it to increase.
        rising = np.concatenate(([True], x[1:] > np.maximum.accumulate(x)[:-1]))
        x, y = x[rising], y[rising]
    return x, y


def _limits(axes: Axes, curves: Sequence[FloatArray], runs: Sequence[Run]) -> None:
    """Frame the part near the target: the first, bad evaluations would flatten the rest."""
    values = np.concatenate([y for y in curves if len(y)] or [np.zeros(0)])
    targets = {run.target.validation for run in runs if run.target}
    if not values.size or not targets:
        return
    # With few evaluations all of them matter.
    cut = 15.0 if values.size >= 10 * len(curves) else 0.0
    lower = next(run.target.lower_is_better for run in runs if run.target)
    low, high = float(values.min()), float(values.max())
    if lower:
        low, high = min(low, *targets), max(float(np.percentile(values, 100 - cut)), *targets)
    else:
        low, high = min(float(np.percentile(values, cut)), *targets), max(high, *targets)
    margin = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)


def _crossing_x(run: Run, against: str, unit: float) -> float:
    if run.crossing is None:
        return math.nan
    return (run.crossing.step if against == "steps" else run.crossing.seconds) / unit


def _panel(
    axes: Axes, methods: dict[str, list[Run]], looks: dict[str, int], against: str, unit: float
) -> None:
    """Draw one workload's runs against steps or time; ``looks`` gives each method's style."""
    drawn: list[FloatArray] = []
    for method, runs in methods.items():
        index = looks[method]
        style = _style(index)
        shown = [run for run in runs if against == "seconds" or run.steps_comparable]
        curves = [_curve(run, against, unit) for run in shown]
        drawn += [y for _, y in curves]
        # One collection for all single runs keeps hundreds of them fast.
        lines = [np.column_stack(curve) for curve in curves if len(curve[0])]
        axes.add_collection(
            LineCollection(lines, colors=style["color"], linewidths=0.7, alpha=0.35)
        )
        best = [representative(bundle) for bundle in repetitions(shown)]
        mean = mean_curve([_curve(run, against, unit) for run in best])
        label = _label(f"{method} ({len(best) or 'counts other steps'})")
        style |= {
            "marker": _MARKERS[index % len(_MARKERS)],
            "markerfacecolor": "white",
            "markersize": 6,
        }
        if mean is None:
            axes.plot([], [], label=label, linewidth=1.8, **style)
        else:
            grid, centre, spread = mean
            axes.plot(grid, centre, label=label, linewidth=1.8, markevery=[], **style)
            axes.fill_between(
                grid, centre - spread, centre + spread, color=style["color"], alpha=0.18, lw=0
            )
        points = [
            (_crossing_x(run, against, unit), run.crossing.value) for run in best if run.crossing
        ]
        points = [point for point in points if math.isfinite(point[0])]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, **(style | {"linestyle": "none", "zorder": 4}))
    axes.autoscale_view()
    everyone = [run for runs in methods.values() for run in runs]
    for value in sorted({run.target.validation for run in everyone if run.target}):
        axes.axhline(value, color="0.25", linewidth=1.0, linestyle=(0, (2, 2)))
        axes.annotate(
            f"target {value:.5g}",
            (0.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            ha="left",
            fontsize=8,
        )
    _limits(axes, drawn, everyone)


def _unit(runs: Sequence[Run]) -> tuple[float, str]:
    longest = max(
        (float(np.nanmax(run.seconds)) for run in runs if np.isfinite(run.seconds).any()),
        default=0.0,
    )
    return (3600.0, "hours") if longest >= _HOURS_FROM else (1.0, "seconds")


def _metric_name(runs: Sequence[Run]) -> str:
    return next((run.target.column for run in runs if run.target), "validation metric")


def _time_panel(axes: Axes, methods: dict[str, list[Run]]) -> None:
    """Milliseconds per step in each part of a step, mean over the runs that logged them."""
    names = [name for name, runs in methods.items() if any(run.time_parts for run in runs)]
    left = np.zeros(len(names))
    for index, part in enumerate(TIME_PARTS):
        widths = []
        for name in names:
            logged = [run for run in methods[name] if run.time_parts and run.time_steps > 0]
            per_step = [1e3 * run.time_parts.get(part, 0.0) / run.time_steps for run in logged]
            widths.append(float(np.mean(per_step)) if per_step else 0.0)
        if not any(widths):
            continue
        axes.barh(
            range(len(names)),
            widths,
            left=left,
            height=0.6,
            label=part,
            color=str(round(0.97 - 0.09 * index, 2)),
            edgecolor="black",
            linewidth=0.6,
            hatch=_HATCHES[index % len(_HATCHES)],
        )
        left = left + np.array(widths)
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
    axes.set_xlabel("ms per step")
    axes.set_title("where a step's time goes", fontsize=10)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def table_figure(table: str, runs: Sequence[Run], methods: Sequence[str]) -> Figure:
    """All pictures of one table side by side.

    Args:
        table: its name.
        runs: its runs.
        methods: those of all tables, since a method keeps its look.
    """
    return _figure({table: list(runs)}, methods)


def _figure(workloads: dict[str, list[Run]], everyone: Sequence[str]) -> Figure:
    timed = any(run.time_parts for runs in workloads.values() for run in runs)
    columns = 3 if timed else 2
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * len(workloads)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(workloads), columns, squeeze=False)
    looks = {method: index for index, method in enumerate(everyone)}
    for row, (workload, runs) in enumerate(workloads.items()):
        methods: dict[str, list[Run]] = {}
        for run in runs:
            methods.setdefault(run.method, []).append(run)
        unit, unit_name = _unit(runs)
        for axes, against, scale in ((grid[row][0], "steps", 1.0), (grid[row][1], "seconds", unit)):
            _panel(axes, methods, looks, against, scale)
            axes.set_xlabel("steps" if against == "steps" else f"submission time ({unit_name})")
            axes.set_ylabel(_label(_metric_name(runs)))
            axes.set_title(_label(workload), fontsize=10)
            axes.grid(True, color="0.9", linewidth=0.6)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        if len(methods) <= 12:
            place = "upper right" if _lower(runs) else "lower right"
            grid[row][0].legend(
                fontsize=8, loc=place, title="mean ± s.e. (repetitions)", title_fontsize=8
            )
        if timed:
            if any(run.time_parts for run in runs):
                _time_panel(grid[row][2], methods)
            else:
                grid[row][2].set_axis_off()
    return figure


def _lower(runs: Sequence[Run]) -> bool:
    return any(run.target.lower_is_better for run in runs if run.target)


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
    """Write the pictures of all workloads into one file, a row of panels per workload.

    Thin lines are single runs; the thick line and the band are mean and standard error over
    repetitions (the number in the legend) on the stretch that all of them cover; open marks are
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
    workloads: dict[str, list[Run]] = {}
    for run in runs:
        workloads.setdefault(run.workload, []).append(run)
    return _save(_figure(workloads, sorted({run.method for run in runs})), path)


def profile_figure(profile: Profile) -> Figure:
    """Performance profile: fraction of workloads within a factor of the best method's time."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ordered = sorted(profile.scores, key=lambda name: -profile.scores[name])
    for index, method in enumerate(ordered):
        axes.step(
            profile.taus,
            profile.curves[method],
            where="post",
            label=_label(f"{method} (score {profile.scores[method]:.3f})"),
            linewidth=1.8,
            **_style(index),
        )
    axes.set_xlabel(f"factor of the best method's {profile.measure} to target")
    axes.set_ylabel("fraction of workloads")
    names = _label(", ".join(profile.workloads))
    axes.set_title(f"performance profile over {names}", fontsize=10)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(True, color="0.9", linewidth=0.6)
    if len(ordered) <= 12:
        axes.legend(fontsize=8)
    return figure


def plot_profile(profile: Profile, path: str | os.PathLike[str]) -> Path:
    """Write the performance profile as .png, .svg or .pdf."""
    return _save(profile_figure(profile), path)
