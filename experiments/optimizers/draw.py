"""Pictures: the metric over steps, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import pictures
from experiments.optimizers.logs import Log
from experiments.optimizers.methods import METHODS
from experiments.optimizers.summary import TaskLogs

STYLES = {
    name: (f"C{number % 10}", "-" if name.startswith("kfac") else "--")
    for number, name in enumerate(METHODS)
}


def curves(tasks: Sequence[TaskLogs], path: Path) -> bool:
    """Mean and standard error over seeds of the metric; False without any."""
    shown = [task for task in tasks if task.seeds]
    if not shown:
        return False
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    picture, axes = pictures.figure(columns, rows, 5.2 * columns, 3.8 * rows)
    for axis, task in zip(axes.flat, shown, strict=False):
        for name, runs in task.seeds.items():
            steps, mean, error = over_seeds(runs)
            colour, style = STYLES[name]
            axis.plot(steps, mean, style, color=colour, label=METHODS[name].label, linewidth=1.3)
            axis.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
        axis.set_title(task.name)
        axis.set_xlabel("steps")
        axis.set_ylabel(task.metric)
        if not task.higher_is_better:
            axis.set_yscale("log")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    shown_lines = [lines[method.label] for method in METHODS.values() if method.label in lines]
    picture.legend(handles=shown_lines, loc="outside lower center", ncols=3, fontsize=8)
    pictures.save(picture, path)
    return True


def over_seeds(runs: Sequence[Log]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and standard error of the metric, at evaluations that all runs have."""
    tables = [{e.step: e.metric for e in log.outcome.evaluations if e.metric is not None}
              for log in runs]  # fmt: skip
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    values = np.array([[table[step] for step in steps] for table in tables], dtype=float)
    spread = values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), spread / len(runs) ** 0.5
