"""Single panels of the pictures: curves with their target and crossings, and times by part."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from steps_to_target.model import TIME_PARTS, FloatArray, Run
from steps_to_target.summary import repetitions, representative

# Colour-blind safe (Okabe and Ito; Tol), none of them near grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#332288", "#56B4E9", "#882255")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
_GRID_POINTS = 200
_LABEL_LENGTH = 30
_LABEL_GAP = 0.062


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def label_text(text: str) -> str:
    """Text that is shown as it is: no mathematics, and in the legend whatever it begins with."""
    shown = _printable(text)
    if len(shown) > _LABEL_LENGTH:
        half = _LABEL_LENGTH // 2
        shown = f"{shown[:half]}…{shown[-half:]}"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def title_text(text: str, width: float) -> str:
    """Text broken into lines that fit a panel of ``width`` inches."""
    lines = textwrap.wrap(_printable(text), max(20, int(width * 10))) or [""]
    return "\n".join(lines).replace("$", r"\$")


def style_of(index: int) -> dict[str, Any]:
    """Colour and line style of the method with this index."""
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
    # With few evaluations all of them matter, unless the first ones are of another magnitude.
    median = abs(float(np.median(values)))
    far = values.size > 3 and float(np.abs(values).max()) > 10 * median
    cut = 15.0 if values.size >= 10 * len(curves) or far else 0.0
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


def _name_curves(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each method's name to the right of where its curve ends, none over another."""
    low, high = axes.get_ylim()
    shares = [(y - low) / (high - low) if math.isfinite(y) else 0.0 for _, y, _ in ends]
    order = sorted(range(len(ends)), key=shares.__getitem__)
    heights = [min(max(shares[index], 0.0), 1.0) for index in order]
    for upper in range(1, len(heights)):
        heights[upper] = max(heights[upper], heights[upper - 1] + _LABEL_GAP)
    above = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, index in zip(heights, order, strict=True):
        label, _, colour = ends[index]
        axes.annotate(
            label,
            (1.0, height - above),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )


def curves_panel(
    axes: Axes,
    methods: dict[str, list[Run]],
    looks: dict[str, int],
    against: str,
    unit: float,
    named: bool,
) -> None:
    """Draw one table's runs against steps or time; ``looks`` gives each method's style."""
    drawn: list[FloatArray] = []
    ends: list[tuple[str, float, str]] = []
    for method, runs in methods.items():
        index = looks[method]
        style = style_of(index)
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
        label = label_text(f"{method} ({len(best) or 'other steps'})")
        style |= {
            "marker": MARKERS[index % len(MARKERS)],
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
        last = mean[1][-1] if mean else next((y[-1] for _, y in curves if len(y)), math.nan)
        ends.append((label, float(last), style["color"]))
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
        axes.axhline(value, color="0.35", linewidth=1.0, linestyle=(0, (2, 2)))
        axes.annotate(
            f"target {value:.5g}",
            (0.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            ha="left",
            fontsize=8,
            color="0.35",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            zorder=5,
        )
    _limits(axes, drawn, everyone)
    if named:
        _name_curves(axes, ends)


def time_panel(axes: Axes, methods: dict[str, list[Run]]) -> None:
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
    axes.set_yticks(range(len(names)), [label_text(name) for name in names])
    axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
    axes.set_xlabel("ms per step")
    axes.set_title("where a step's time goes", fontsize=10)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
