"""The data that the other files pass around: a run, its crossing, its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steps_to_target.targets import Target

FloatArray = NDArray[np.float64]

TIME_PARTS = ("forward", "factors", "inverses", "precondition", "update", "data")


class Status(StrEnum):
    """How a run ended, seen from its validation target."""

    REACHED = "reached"
    MISSED = "missed"
    OUT_OF_TIME = "out of time"
    CUT_SHORT = "cut short"
    CRASHED = "crashed"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Crossing:
    """The first evaluation that meets a target.

    The true crossing lies after the evaluation before and not later than this one.

    Attributes:
        step: training steps at the evaluation.
        seconds: accumulated submission time at the evaluation (NaN where it was not logged).
        value: the metric there.
        previous_step: steps at the evaluation before (None: this is the first one).
        previous_seconds: accumulated submission time at the evaluation before.
    """

    step: float
    seconds: float
    value: float
    previous_step: float | None
    previous_seconds: float | None


@dataclass(frozen=True)
class Identity:
    """Which run this is. ``study`` and ``trial`` are as in the folder names, without prefix."""

    workload: str
    method: str
    study: str
    trial: str
    framework: str = ""

    @property
    def label(self) -> str:
        """A name for messages and for wandb."""
        return f"{self.workload}/{self.method}/study_{self.study}/trial_{self.trial}"


@dataclass(frozen=True)
class Ending:
    """What the log says about the run's end.

    Attributes:
        final_row: AlgoPerf's last row (total time, no metrics) closes the log.
        step: last step that the log mentions (None: none).
        seconds: accumulated submission time in the final row, else at the last evaluation.
        loss: last logged training loss.
        known: whether measurements.csv could be read at all.
    """

    final_row: bool = False
    step: float | None = None
    seconds: float | None = None
    loss: float | None = None
    known: bool = True


@dataclass(frozen=True)
class Note:
    """Something that a run's log shows.

    Attributes:
        kind: what it is, the same words for all runs that show it.
        detail: what it is for this run.
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass(frozen=True)
class Run:
    """One trial, read and judged.

    ``steps``, ``seconds`` and ``values`` (each shape ``(evaluations,)``) are the surviving
    trajectory: evaluations that a resume rolled back are left out. ``values`` is the validation
    metric, ``test_values`` the test metric, NaN where it was not logged. ``metrics`` names all
    validation metrics in the log.
    """

    identity: Identity
    path: str
    target: Target | None
    status: Status
    evidence: str
    crossing: Crossing | None
    test_crossing: Crossing | None
    resumes: int
    steps: FloatArray
    seconds: FloatArray
    values: FloatArray
    test_values: FloatArray
    time_parts: Mapping[str, float] = field(default_factory=dict)
    time_steps: float = float("nan")
    hparams: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    steps_comparable: bool = True
    ending: Ending = field(default_factory=Ending)

    @property
    def workload(self) -> str:
        """Workload without framework, e.g. ``"ogbg"``."""
        return self.identity.workload

    @property
    def method(self) -> str:
        """Name of the training algorithm (a folder's name)."""
        return self.identity.method

    @property
    def framework(self) -> str:
        """``"pytorch"``, ``"jax"`` or empty."""
        return self.identity.framework

    @property
    def study(self) -> str:
        """Study index or seed, as in the folder's name."""
        return self.identity.study

    @property
    def trial(self) -> str:
        """Trial index, as in the folder's name."""
        return self.identity.trial

    @property
    def reached(self) -> bool:
        """Whether the validation target was met."""
        return self.crossing is not None
