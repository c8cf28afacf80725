"""Runs training processes a few at a time and shows how far they are."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from quickstart.errors import explain_os_error
from quickstart.reporting import progress_columns

POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0


@dataclass
class Job:
    """One training process.

    Attributes:
        name: shown to the user.
        arguments: flags for `quickstart.runner`, without the progress file.
        log: file that receives everything the process prints.
    """

    name: str
    arguments: list[str]
    log: Path


@dataclass
class Outcome:
    """How a job ended: its exit code, and for a failed one the last line it printed."""

    job: Job
    code: int
    last_line: str
    seconds: float


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    task: TaskID
    started: float = field(default_factory=time.monotonic)

    @property
    def progress_file(self) -> Path:
        return _progress_file(self.job)


def run_jobs(
    jobs: Iterable[Job],
    *,
    at_once: int,
    steps: int,
    metric: str,
    console: Console,
    on_end: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Runs all jobs, `at_once` at a time, one thread each.

    Args:
        jobs: what to run.
        at_once: number of processes.
        steps: number of steps of each job at most, for the bars.
        metric: name of the validation metric.
        console: where to show progress.
        on_end: called after each job.

    Returns:
        The outcomes in the order in which the jobs ended. On Ctrl-C all processes are asked to
        stop, waited for, and KeyboardInterrupt goes on to the caller.
    """
    waiting = list(jobs)
    count = len(waiting)
    running: list[_Running] = []
    outcomes: list[Outcome] = []
    with Progress(*progress_columns(metric), console=console, expand=True) as progress:
        whole = progress.add_task(f"all {count} runs", total=count * steps, loss="-", value="-")
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(_start(waiting.pop(0), progress, steps))
                time.sleep(POLL_SECONDS)
                for item in list(running):
                    _show(item, progress)
                    code = item.process.poll()
                    if code is None:
                        continue
                    running.remove(item)
                    progress.remove_task(item.task)
                    outcome = _outcome(item, code)
                    outcomes.append(outcome)
                    _announce(outcome, console)
                    if on_end is not None:
                        on_end(outcome)
                done = sum(
                    progress.tasks[_index(progress, item.task)].completed for item in running
                )
                progress.update(whole, completed=len(outcomes) * steps + done)
        finally:
            _stop(running)
    return outcomes


def _start(job: Job, progress: Progress, steps: int) -> _Running:
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        _progress_file(job).unlink(missing_ok=True)
        log = job.log.open("wb")
    except OSError as error:
        raise explain_os_error(error, job.log) from error
    command = [sys.executable, "-m", "quickstart.runner", *job.arguments]
    with log:
        process = subprocess.Popen(
            [*command, f"--progress_file={_progress_file(job)}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            # Ctrl-C reaches this process alone, which then stops the others one by one.
            start_new_session=True,
        )
    task = progress.add_task(job.name, total=steps, loss="-", value="-")
    return _Running(job, process, task)


def _show(item: _Running, progress: Progress) -> None:
    state = _read_progress(item.progress_file)
    changes: dict[str, Any] = {
        name: f"{state[name]:.4f}" for name in ("loss", "value") if name in state
    }
    progress.update(item.task, completed=int(state.get("step", 0)), **changes)


def _read_progress(path: Path) -> dict[str, float]:
    try:
        state: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state


def _outcome(item: _Running, code: int) -> Outcome:
    lines = item.job.log.read_text(encoding="utf-8", errors="replace").split("\n")
    told = [line.strip() for line in lines if line.strip()]
    item.progress_file.unlink(missing_ok=True)
    last = told[-1] if told else "it printed nothing"
    return Outcome(item.job, code, last, time.monotonic() - item.started)


def _announce(outcome: Outcome, console: Console) -> None:
    name, seconds = outcome.job.name, outcome.seconds
    if outcome.code == 0:
        console.print(f"{name}: done in {seconds:.0f} s", markup=False, highlight=False)
    else:
        console.print(
            f"{name}: failed: {outcome.last_line} (log: {outcome.job.log})",
            markup=False, highlight=False, style="red", soft_wrap=True,
        )  # fmt: skip


def _stop(running: list[_Running]) -> None:
    for item in running:
        if item.process.poll() is None:
            item.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for item in running:
        try:
            item.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            item.process.kill()
            item.process.wait()
        item.progress_file.unlink(missing_ok=True)


def _progress_file(job: Job) -> Path:
    return job.log.with_suffix(".progress.json")


def _index(progress: Progress, task: TaskID) -> int:
    return next(i for i, shown in enumerate(progress.tasks) if shown.id == task)
