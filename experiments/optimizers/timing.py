"""Seconds per step of all methods, measured in turns so that all meet the same load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from experiments import results
from experiments.optimizers.logs import context
from experiments.optimizers.methods import INTERVAL, METHODS, Point, Stepper, point_key
from experiments.optimizers.task import Batch, Task
from experiments.optimizers.training import train_step
from quickstart.errors import QuickstartError, writing

SEED = 100
RATE = 0.01  # of the peak learning rate: cost does not depend on it, and nothing diverges


@dataclass
class _Running:
    model: nn.Module
    stepper: Stepper
    batches: Iterator[Batch]


def measure(task: Task, points: Mapping[str, Point], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each method, a value for each round of 10 steps.

    Whatever is renewed every 10 steps is renewed once in a round. Data count, evaluations do not.
    Two rounds before are left out: K-FAC renews its factors more often there.
    """
    running = {}
    for name, point in points.items():
        model = task.make_model(SEED)
        model.train()
        stepper = METHODS[name].build(model, task, point, SEED)
        stepper.scale_learning_rates(RATE)
        running[name] = _Running(model, stepper, iter(task.batches(SEED)))
    seconds: dict[str, list[float]] = {name: [] for name in points}
    for number in range(rounds + 2):
        for name, one in running.items():
            start = time.perf_counter()
            for _ in range(INTERVAL):
                train_step(task, one.model, one.stepper, next(one.batches))
            results.synchronize(task.device)
            if number >= 2:
                seconds[name].append((time.perf_counter() - start) / INTERVAL)
    return seconds


def path(folder: Path, task: str) -> Path:
    """Where the result of a task lies."""
    return folder / task / "timing.json"


def write(folder: Path, task: Task, points: Mapping[str, Point], rounds: int) -> None:
    """Measures and writes.

    Raises:
        QuickstartError: the folder cannot be written.
    """
    content = {
        "setting": task.setting,
        "points": {name: dict(point) for name, point in points.items()},
        "seconds_per_step": measure(task, points, rounds),
        "context": context(),
    }
    with writing(path(folder, task.name)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, task: str, setting: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds per step by method; empty if this setting was not measured.

    Raises:
        QuickstartError: the file is damaged.
    """
    file = path(folder, task)
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if point_key(content["setting"]) != point_key(setting):
            return {}
        found: dict[str, list[float]] = content["seconds_per_step"]
        return found
    except (OSError, ValueError, KeyError) as error:
        raise QuickstartError(f"{file} is damaged ({error}): delete it and time again") from error
