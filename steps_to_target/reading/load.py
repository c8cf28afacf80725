"""Everything below some paths, or on wandb's service."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from steps_to_target.errors import CompareError
from steps_to_target.model import Identity, Run
from steps_to_target.reading import folders
from steps_to_target.reading.copies import without_copies
from steps_to_target.reading.trial import Targets, read_trial
from steps_to_target.wandb_runs import read as wandb_read

WANDB_PREFIX = "wandb:"
_NAMED = 3


@dataclass(frozen=True)
class Loaded:
    """Runs sorted by workload, method, study and trial, and what was passed over."""

    runs: list[Run]
    notes: tuple[str, ...] = ()


def _passed_over(found: folders.Found) -> list[str]:
    notes = []
    for places, text in (
        (found.archives, "archive folder(s) passed over (name one to read it)"),
        (found.empty, "empty trial folder(s) passed over"),
    ):
        if places:
            names = ", ".join(map(str, places[:_NAMED]))
            more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
            notes.append(f"{len(places)} {text}: {names}{more}")
    return notes


def load(paths: Iterable[str | os.PathLike[str]], *, targets: Targets | None = None) -> Loaded:
    """Read all runs at or below the given paths; copies of one log count once.

    Args:
        paths: folders at any level (trial, workload, study, method, or a parent of several), log
            files, offline wandb folders, or ``"wandb:ENTITY/PROJECT[/RUN]"`` for the wandb service.
        targets: targets by workload that replace the logged ones.

    Raises:
        CompareError: a path does not exist or is a file and no log, there is no run in any of them,
            or a target names a workload or a metric that no run has.
    """
    given = [os.fspath(path) for path in paths]
    if not given:
        raise CompareError("no folder given; name at least one folder of runs")
    found: dict[str, tuple[Run, Path]] = {}
    notes: list[str] = []
    for text in given:
        if text.startswith(WANDB_PREFIX):
            for run in wandb_read.read_service(text[len(WANDB_PREFIX) :], targets):
                found[run.path] = (run, Path(run.path))
            continue
        path = Path(text).expanduser()
        is_wandb_file = path.suffix == wandb_read.SUFFIX and path.is_file()
        trials = folders.Found() if is_wandb_file else folders.find_trials(path)
        for folder in trials.trials:
            if str(folder) not in found:
                found[str(folder)] = read_trial(folder, targets)
        notes += _passed_over(trials)
        if not trials.trials:  # then there may be wandb's files only
            for run in wandb_read.read_offline(path, targets):
                found[run.path] = (run, Path(run.path).parent)
    if not found:
        raise CompareError(
            f"no run found in {', '.join(given)}: looked for trial_*/{folders.EVALUATIONS} below "
            "<method>/study_*/<workload>_<framework>/ or <experiment>/<workload>_<framework>/, and "
            "for offline wandb runs" + "".join(f"; {note}" for note in notes)
        )
    places = {run.path: place for run, place in found.values()}
    runs = without_copies([run for run, _ in found.values()])
    identities = folders.disambiguate([(run.identity, places[run.path]) for run in runs])
    runs = [replace(run, identity=identity) for run, identity in zip(runs, identities, strict=True)]
    _check_targets(runs, targets or {})
    return Loaded(sorted(runs, key=lambda run: _order(run.identity)), tuple(dict.fromkeys(notes)))


def load_runs(
    paths: Iterable[str | os.PathLike[str]], *, targets: Targets | None = None
) -> list[Run]:
    """``load`` without what was passed over."""
    return load(paths, targets=targets).runs


def _check_targets(runs: list[Run], targets: Targets) -> None:
    """A target that no run can have is a typing mistake."""
    for workload, override in targets.items():
        members = [run for run in runs if run.workload == workload]
        names = sorted({run.workload for run in runs})
        kind, wanted = "workload", workload
        if members:
            names = sorted({metric for run in members for metric in run.metrics})
            kind, wanted = "validation metric", override.metric
            if wanted in names or not names:
                continue
        close = get_close_matches(wanted, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise CompareError(
            f"--target: no run has the {kind} {wanted!r}{hint}; there are: {', '.join(names)}"
        )


def _order(identity: Identity) -> tuple[Any, ...]:
    def natural(text: str) -> tuple[int, int, str]:
        # isdecimal and a bound: "²" is a digit but no int, and int() refuses 5,000 digits.
        return (0, int(text), "") if text.isdecimal() and len(text) < 18 else (1, 0, text)

    return (identity.workload, identity.method, natural(identity.study), natural(identity.trial))
