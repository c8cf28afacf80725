"""What a run shows while it trains: a progress bar, lines of text, or a file that others read."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quickstart.errors import writing


class Reporter(Protocol):
    """Told about each step and each evaluation, off the clock."""

    def step(self, global_step: int, workload: Any) -> None:
        """A step has ended."""

    def evaluation(self, global_step: int, result: dict[str, float], workload: Any) -> None:
        """An evaluation has ended."""

    def close(self) -> None:
        """The run has ended, well or not."""


def recent_loss(workload: Any) -> float:
    """Mean loss of the latest training batch, NaN before the first."""
    if workload.recent_loss is None:
        return float("nan")
    summed, count = workload.recent_loss
    return float(summed) / max(float(count), 1.0)


def progress_columns(metric: str) -> tuple[Any, ...]:
    """Columns of a bar: name, bar, step, loss, validation metric, time left."""
    short = {"mean_average_precision": "mAP"}.get(metric, metric)
    return (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn(f"val. {short} {{task.fields[value]}}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )


class BarReporter:
    """A progress bar on a terminal."""

    def __init__(self, description: str, total: int, metric: str) -> None:
        self._metric = metric
        self._progress = Progress(
            *progress_columns(metric), console=Console(stderr=True), expand=True
        )
        self._task = self._progress.add_task(description, total=total, loss="-", value="-")
        self._progress.start()
        self._last = 0.0

    def step(self, global_step: int, workload: Any) -> None:
        """Moves the bar, at most four times a second."""
        now = time.monotonic()
        if now - self._last > 0.25:
            self._last = now
            loss = f"{recent_loss(workload):.4f}"
            self._progress.update(self._task, completed=global_step, loss=loss)

    def evaluation(self, global_step: int, result: dict[str, float], workload: Any) -> None:
        """Shows the validation metric."""
        value = f"{result[f'validation/{self._metric}']:.4f}"
        loss = f"{recent_loss(workload):.4f}"
        self._progress.update(self._task, completed=global_step, loss=loss, value=value)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._progress.stop()


class LineReporter:
    """One line of text per evaluation, for logs."""

    def __init__(self, total: int, metric: str) -> None:
        self._total = total
        self._metric = metric

    def step(self, global_step: int, workload: Any) -> None:
        """Says nothing."""

    def evaluation(self, global_step: int, result: dict[str, float], workload: Any) -> None:
        """Prints the evaluation."""
        print(
            f"step {global_step}/{self._total}  "
            f"{result['accumulated_submission_time']:.1f} s  "
            f"train loss {result['train/loss']:.4f}  "
            f"validation {self._metric} {result[f'validation/{self._metric}']:.4f}  "
            f"test {result[f'test/{self._metric}']:.4f}",
            flush=True,
        )

    def close(self) -> None:
        """Does nothing."""


class FileReporter:
    """Keeps a small JSON file up to date that the parent process reads, and ends with it."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path = path
        self._metric = metric
        self._last = 0.0
        self._parent = os.getppid()
        self._state: dict[str, float] = {}

    def step(self, global_step: int, workload: Any) -> None:
        """Writes step and loss, at most twice a second."""
        now = time.monotonic()
        if now - self._last > 0.5:
            self._last = now
            if os.getppid() != self._parent:  # It was killed: nobody waits for this run.
                raise KeyboardInterrupt
            self._write(step=global_step, loss=recent_loss(workload))

    def evaluation(self, global_step: int, result: dict[str, float], workload: Any) -> None:
        """Writes the validation metric."""
        value = result[f"validation/{self._metric}"]
        self._write(step=global_step, loss=recent_loss(workload), value=value)

    def close(self) -> None:
        """Does nothing: what ended how is in the run's folder."""

    def _write(self, **changes: float) -> None:
        self._state.update(changes)
        with writing(self._path) as temporary:
            temporary.write_text(json.dumps(self._state), encoding="utf-8")


class Reporters:
    """Several reporters as one."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def step(self, global_step: int, workload: Any) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.step(global_step, workload)

    def evaluation(self, global_step: int, result: dict[str, float], workload: Any) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.evaluation(global_step, result, workload)

    def close(self) -> None:
        """Closes all."""
        for reporter in self._reporters:
            reporter.close()


def choose_reporter(
    description: str, total: int, metric: str, progress_file: Path | None
) -> Reporters:
    """A bar on a terminal, lines elsewhere, and the progress file if one is asked for."""
    shown: Reporter
    if sys.stderr.isatty():
        shown = BarReporter(description, total, metric)
    else:
        shown = LineReporter(total, metric)
    if progress_file is None:
        return Reporters(shown)
    return Reporters(shown, FileReporter(progress_file, metric))
