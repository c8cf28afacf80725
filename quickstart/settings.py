"""Where the studies' settings lie, and how they are read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart.errors import QuickstartError

SETTINGS = Path(__file__).resolve().parent / "settings"
_NOT_METHODS = ("study", "tuning", "tuning_results")


@dataclass(frozen=True)
class Comparison:
    """Methods that run to one target, and the method that they are compared with.

    Attributes:
        reference: the first-order method whose update rule the others share.
        methods: in the order in which they are run and shown, the reference among them.
        validation_target_value, test_target_value: metric values to reach.
        targets_fixed: the day on which they were, before any run of the study.
    """

    reference: str
    methods: list[str]
    validation_target_value: float
    test_target_value: float
    targets_fixed: str = ""


@dataclass(frozen=True)
class StudySettings:
    """What all runs of a study share.

    Attributes:
        comparisons: one table each; no method is in two of them.
        seeds: one run each per method.
        max_global_steps: steps of a run at most.
        eval_every, eval_every_early: steps between evaluations, None for the workload's own.
    """

    comparisons: list[Comparison]
    seeds: list[int]
    max_global_steps: int
    eval_every: int | None = None
    eval_every_early: int | None = None

    @property
    def methods(self) -> list[str]:
        """All methods of the study."""
        return [method for comparison in self.comparisons for method in comparison.methods]

    def comparison_of(self, method: str) -> Comparison:
        """The comparison that a method takes part in; the first one for methods in none."""
        for comparison in self.comparisons:
            if method in comparison.methods:
                return comparison
        return self.comparisons[0]


def folder(workload: str) -> Path:
    """The folder with a workload's settings.

    Raises:
        QuickstartError: if there are none.
    """
    path = SETTINGS / workload
    if not path.is_dir():
        known = ", ".join(sorted(p.name for p in SETTINGS.iterdir() if p.is_dir()))
        raise QuickstartError(f"no settings for the workload {workload!r}; there are: {known}")
    return path


def read_study(workload: str) -> StudySettings:
    """The settings that a workload's study shares."""
    content = read_json(folder(workload) / "study.json")
    comparisons = [Comparison(**comparison) for comparison in content.pop("comparisons")]
    return StudySettings(comparisons, **content)


def method_file(workload: str, method: str) -> Path:
    """The tuning point of a method.

    Raises:
        QuickstartError: if there is no such method.
    """
    path = folder(workload) / f"{method}.json"
    if method in _NOT_METHODS or not path.is_file():
        known = ", ".join(list_methods(workload))
        raise QuickstartError(f"no method {method!r} for {workload}; there are: {known}")
    return path


def list_methods(workload: str) -> list[str]:
    """All methods with a tuning point."""
    files = sorted(folder(workload).glob("*.json"))
    return [file.stem for file in files if file.stem not in _NOT_METHODS]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        QuickstartError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuickstartError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise QuickstartError(f"{path} is not JSON: {error}") from error
