"""Warnings where runs that are compared differ in what makes them comparable.

A warning is of a kind ("hardware differs"), about a table of the comparison, and has a detail.
There is one line for each kind: tables with the same detail share it, and many tables are counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steps_to_target.model import Run
from steps_to_target.reading.metadata import algoperf_commit, hardware, positive

_NAMED = 3


@dataclass(frozen=True)
class Caution:
    """One thing that makes runs hard to compare.

    Attributes:
        kind: what differs, in the same words for all tables.
        subject: the table, or the run, that it is about.
        detail: how.
    """

    kind: str
    subject: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.kind}" + (f": {self.detail}" if self.detail else "")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def grouped(warnings: Iterable[Caution]) -> list[str]:
    """One line for each kind, in the order in which kinds come up first."""
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for warning in warnings:
        kinds[warning.kind][warning.detail].append(warning.subject)
    lines = []
    for kind, details in kinds.items():
        subjects = list(dict.fromkeys(name for names in details.values() for name in names))
        first, *others = details
        if not others:
            lines.append(f"{_some(subjects)}: {kind}" + (f": {first}" if first else ""))
        elif len(details) <= _NAMED:
            parts = [f"{_some(names)}: {text}" for text, names in details.items()]
            lines.append(f"{kind}: " + "; ".join(parts))
        else:
            names = _some(subjects)
            lines.append(f"{kind}: {len(subjects)} in all: {names} (the first: {first})")
    return lines


def _batch_size(run: Run) -> str:
    names = ("batch_size", "global_batch_size", "train_batch_size")
    for source, keys in (
        (run.hparams, names),
        (run.meta, tuple(f"workload.{name}" for name in names) + names),
        (run.flags, names),
    ):
        value = positive(source, *keys)
        if value is not None:
            return f"{value:,.0f}"
    return ""


def _flag(name: str) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        value: Any = run.flags.get(name)
        return "" if value is None else str(value)

    return get


def _step_budget(run: Run) -> str:
    if "max_global_steps" not in run.flags:
        return ""
    value = positive(run.flags, "max_global_steps")
    return "none" if value is None else f"{value:,.0f} steps"


def _meta_number(name: str, unit: str) -> Callable[[Run], str]:
    def get(run: Run) -> str:
        value = positive(run.meta, name)
        return "" if value is None else f"{value:,.0f} {unit}"

    return get


_ASPECTS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("hardware differs", lambda run: hardware(run.meta)),
    ("batch sizes differ", _batch_size),
    ("step budgets (max_global_steps) differ", _step_budget),
    ("step hints differ", _meta_number("workload.step_hint", "steps")),
    ("time limits differ", _meta_number("workload.max_allowed_runtime_sec", "s")),
    ("AlgoPerf versions differ", lambda run: algoperf_commit(run.meta, run.flags)),
    ("frameworks differ", lambda run: run.framework),
    ("tuning rulesets differ", _flag("tuning_ruleset")),
)


def _spread(values: Mapping[str, list[str]]) -> str:
    """``"8 x V100 (a, b); 4 x A100 (c)"`` from value -> methods."""
    return "; ".join(
        f"{value} ({', '.join(dict.fromkeys(methods))})" for value, methods in values.items()
    )


def comparison_warnings(table: str, methods: Mapping[str, Sequence[Run]]) -> list[Caution]:
    """What the runs of one table differ in, and what single runs' logs say.

    Args:
        table: its name.
        methods: runs by method.

    Returns:
        One for each difference. What a run did not log is not compared.
    """
    found = []
    for kind, get in _ASPECTS:
        values: dict[str, list[str]] = defaultdict(list)
        for method, runs in methods.items():
            for run in runs:
                if value := get(run):
                    values[value].append(method)
        if len(values) > 1:
            found.append(Caution(kind, table, _spread(values)))
    found += _budget_warnings(table, methods)
    notes = [(note, run) for runs in methods.values() for run in runs for note in run.notes]
    return found + [Caution(note.kind, run.identity.label, note.detail) for note, run in notes]


def _budget_warnings(table: str, methods: Mapping[str, Sequence[Run]]) -> list[Caution]:
    """A method that had more trials per study than another was tuned more."""
    trials: dict[str, list[str]] = defaultdict(list)
    for method, runs in methods.items():
        studies = [run.study for run in runs]
        if studies:
            trials[str(max(map(studies.count, studies)))].append(method)
    kind = "trials per study differ, so fastest-of-study is not equally tuned"
    return [Caution(kind, table, _spread(trials))] if len(trials) > 1 else []
