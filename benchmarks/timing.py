"""Measures steps: CPU time and wall time, methods taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Step = Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """Seconds of one step.

    Attributes:
        cpu: time of all threads of the process; insensitive to other processes.
        wall: time on the clock.
    """

    cpu: float
    wall: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of a list of at least one value."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(step: Step, device: torch.device) -> Sample:
    """Times one call, with all work on the device done."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return Sample(time.process_time() - cpu, time.perf_counter() - wall)


@dataclass
class Race:
    """What `race` measured.

    Attributes:
        samples: name of a step -> one sample per round.
        failures: name of a step that could not run -> why.
    """

    samples: dict[str, list[Sample]]
    failures: dict[str, str]

    def ratio(self, name: str, to: str, clock: str) -> Spread:
        """Spread over the rounds of time(name) / time(to); clock is "cpu" or "wall"."""
        pairs = zip(self.samples[name], self.samples[to], strict=True)
        return Spread.of([getattr(a, clock) / getattr(b, clock) for a, b in pairs])

    def seconds(self, name: str, clock: str) -> Spread:
        """Spread over the rounds of the seconds of a step."""
        return Spread.of([getattr(sample, clock) for sample in self.samples[name]])


def race(
    steps: Mapping[str, Step],
    repeats: int,
    device: torch.device,
    on_step: Callable[[str], None] = lambda name: None,
) -> Race:
    """Runs all steps in turn, `repeats` rounds after one round that does not count.

    Taking turns spreads whatever else the machine does over all methods. A step that raises in
    the first round is left out, with its reason.

    Args:
        on_step: called before every step.
    """
    failures: dict[str, str] = {}
    for name, step in steps.items():
        on_step(name)
        try:
            step()
        except Exception as error:  # whatever a peer raises is its row's text
            failures[name] = first_line(error)
    running = {name: step for name, step in steps.items() if name not in failures}
    samples: dict[str, list[Sample]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, step in running.items():
            on_step(name)
            samples[name].append(measure(step, device))
    return Race(samples, failures)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, at most 160 characters of it."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 160 else lines[0][:160] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Gemm:
    """One large matrix product, to find out what the machine can do.

    Args:
        side: of the square float32 matrices.
    """

    def __init__(self, device: torch.device, side: int = 1536) -> None:
        self.flops = 2.0 * side**3
        self._a: Tensor = torch.randn(side, side, device=device)
        self._b: Tensor = torch.randn(side, side, device=device)
        self._out: Tensor = torch.empty(side, side, device=device)

    def __call__(self) -> None:
        torch.mm(self._a, self._b, out=self._out)

    def peak(self, samples: list[Sample]) -> Sample:
        """Largest rates seen, in floating-point operations a second of each clock."""
        return Sample(
            self.flops / min(sample.cpu for sample in samples),
            self.flops / min(sample.wall for sample in samples),
        )
