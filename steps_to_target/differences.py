"""Warnings where runs that are compared differ in what makes them comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steps_to_target.model import Run
from steps_to_target.reader import hardware, positive

_NAMED_RUNS = 3


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


def _target(run: Run) -> str:
    target = run.target
    return f"{target.metric} {target.sign} {target.validation:.6g}" if target else ""


def _version(run: Run) -> str:
    commit = run.meta.get("git_commit_hash")
    return commit[:10] if isinstance(commit, str) else ""


_ASPECTS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("hardware differs", lambda run: hardware(run.meta)),
    ("targets differ", _target),
    ("batch sizes differ", _batch_size),
    ("step budgets (max_global_steps) differ", _step_budget),
    ("step hints differ", _meta_number("workload.step_hint", "steps")),
    ("time limits differ", _meta_number("workload.max_allowed_runtime_sec", "s")),
    ("AlgoPerf versions (git commits) differ", _version),
    ("frameworks differ", lambda run: run.framework),
    ("tuning rulesets differ", _flag("tuning_ruleset")),
)


def _spread(values: Mapping[str, Mapping[str, int]]) -> str:
    """``"8 x V100 (a, b); 4 x A100 (c: 2 runs of 5)"`` from value -> method -> runs."""
    parts = []
    for value, methods in values.items():
        parts.append(f"{value} ({', '.join(methods)})")
    return "; ".join(parts)


def comparison_warnings(workload: str, methods: Mapping[str, Sequence[Run]]) -> list[str]:
    """What the runs of one workload differ in, and what single runs' logs say.

    Args:
        workload: its name.
        methods: runs by method.

    Returns:
        One line per difference. What a run did not log is not compared.
    """
    lines = []
    for text, get in _ASPECTS:
        values: dict[str, dict[str, int]] = {}
        for method, runs in methods.items():
            for run in runs:
                value = get(run)
                if value:
                    counts = values.setdefault(value, {})
                    counts[method] = counts.get(method, 0) + 1
        if len(values) > 1:
            lines.append(f"{workload}: {text}: {_spread(values)}")
    lines += _budget_warnings(workload, methods)
    return lines + _run_notes(methods)


def _budget_warnings(workload: str, methods: Mapping[str, Sequence[Run]]) -> list[str]:
    """A method that had more trials per study than another was tuned more."""
    trials: dict[str, list[str]] = {}
    for method, runs in methods.items():
        studies: dict[str, int] = {}
        for run in runs:
            studies[run.study] = studies.get(run.study, 0) + 1
        if studies:
            trials.setdefault(str(max(studies.values())), []).append(method)
    if len(trials) < 2:
        return []
    spread = "; ".join(f"{count} ({', '.join(names)})" for count, names in trials.items())
    return [
        f"{workload}: trials per study differ, so fastest-of-study is not equally tuned: {spread}"
    ]


def _run_notes(methods: Mapping[str, Sequence[Run]]) -> list[str]:
    """Notes of single runs, equal ones of one method put together."""
    lines = []
    for runs in methods.values():
        notes: dict[str, list[Run]] = {}
        for run in runs:
            for note in run.notes:
                notes.setdefault(note, []).append(run)
        for note, members in notes.items():
            names = ", ".join(run.identity.label for run in members[:_NAMED_RUNS])
            if len(members) > _NAMED_RUNS:
                names += f" and {len(members) - _NAMED_RUNS} more"
            lines.append(f"{names}: {note}")
    return lines
