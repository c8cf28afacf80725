"""One trial folder: its files, put together and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steps_to_target.judge import counts_outer_steps, follow, judge
from steps_to_target.model import TIME_PARTS, Ending, Identity, Note, Run
from steps_to_target.reading import folders, tables
from steps_to_target.reading.metadata import hardware, positive, run_budget
from steps_to_target.reading.tables import STEP, Table, column
from steps_to_target.targets import Override, Target, run_target

_TIME = "accumulated_submission_time"
_COLUMNS = {_TIME, STEP, "loss", "preemption_count", "score", "total_duration", "train/loss"}

Targets = Mapping[str, Override]


def _wanted(target: Target | None) -> Callable[[str], bool]:
    """Which columns of the logs are needed to judge a run."""
    metrics = {target.column, target.test_column} if target else set()
    return lambda name: (
        name in _COLUMNS or name in metrics or name.startswith(("time/", "validation/"))
    )


def _is_evaluation(frame: pd.DataFrame, target: Target | None) -> pd.Series:
    """Which rows hold a validation metric (the target's, if there is one)."""
    names = [name for name in frame.columns if name.startswith("validation/")]
    if target is not None:
        names = [target.column] if target.column in frame else []
    return frame[names].notna().any(axis=1)


def find_ending(rows: pd.DataFrame, known: bool) -> Ending:
    """Read the run's end off the rows of measurements.csv.

    AlgoPerf writes one row with ``score`` (the total submission time) and no metrics when the
    training loop ends, whatever ended it; a log without it stopped in between. pandas, with which
    AlgoPerf writes, leaves a loss that is NaN empty: a row that has nothing but its step is one.
    """
    if rows.empty:
        return Ending(known=known)
    last = rows.tail(1)
    total = column(last, "score").iloc[0]
    metrics = last[[name for name in rows.columns if name.startswith("validation/")]]
    final = (
        math.isfinite(total)
        and column(last, _TIME, "total_duration").isna().all()
        and bool(metrics.isna().all(axis=None))
    )
    times = column(rows, _TIME, "score").dropna()
    steps = column(rows, STEP).dropna()
    return Ending(
        final_row=final,
        step=float(steps.iloc[-1]) if len(steps) else None,
        seconds=float(total if final else times.iloc[-1]) if final or len(times) else None,
        loss=_last_loss(rows),
        known=known,
    )


def _last_loss(rows: pd.DataFrame) -> float | None:
    """The training loss where the log ends, NaN for one that is no number; None: never logged."""
    found = []
    if "loss" in rows and rows["loss"].notna().any():
        bare = rows.drop(columns=[STEP, "preemption_count"], errors="ignore").isna().all(axis=1)
        found.append(rows["loss"][rows["loss"].notna() | bare])
    if "train/loss" in rows and rows["train/loss"].notna().any():
        evaluated = column(rows, _TIME, "total_duration").notna()
        found.append(rows["train/loss"][evaluated])
    if not found:
        return None
    together = pd.concat(found)
    last = together[together.index == together.index.max()]
    return float(last.iloc[0])


def _time_parts(rows: pd.DataFrame) -> tuple[dict[str, float], float]:
    """Cumulative seconds by part of a step from the last row that has them, and its step."""
    names = {f"time/{part}": part for part in TIME_PARTS if f"time/{part}" in rows}
    times = rows[list(names)]
    times = times.where(np.isfinite(times) & (times >= 0)).dropna(how="all")
    if times.empty:
        return {}, math.nan
    last = times.rename(columns=names).iloc[-1].dropna()
    return {str(k): float(v) for k, v in last.items()}, float(column(rows, STEP)[times.index[-1]])


def _merge(
    evaluations: Table, measurements: Table, target: Target | None
) -> tuple[pd.DataFrame, list[Note]]:
    """Evaluation rows: those of eval_measurements.csv, or of measurements.csv where it has more.

    AlgoPerf writes each evaluation to both files.
    """
    own, every = evaluations.frame, measurements.frame
    other = every[_is_evaluation(every, target)]
    lost = len(other) - int(_is_evaluation(own, target).sum())
    if lost <= 0:
        return own, []
    detail = f"{lost} evaluation(s) missing from {folders.EVALUATIONS}"
    return other.reset_index(drop=True), [
        Note(f"evaluations were taken from {folders.MEASUREMENTS}", detail)
    ]


def _problem(
    evaluations: Table, measurements: Table, rows: pd.DataFrame, target: Target | None
) -> tuple[str, bool]:
    """Why no metric can be had, for the evidence (empty: it can), and whether it is the form."""
    if target is not None and len(rows) and not _is_evaluation(rows, target).any():
        columns = evaluations.columns or measurements.columns
        if target.column in columns:  # or it is NaN, which AlgoPerf writes as an empty cell
            words = target.column in evaluations.words | measurements.words
            return (f"{target.column} is never a number", True) if words else ("", False)
        have = ", ".join(name for name in columns if name.startswith("validation/")) or "none"
        return f"no column {target.column} in the log (validation columns: {have})", False
    if STEP in evaluations.words:
        return f"{STEP} is never a number", True
    named = ((folders.EVALUATIONS, evaluations), (folders.MEASUREMENTS, measurements))
    parts = [f"{name} {table.problem}" for name, table in named if table.problem]
    if not parts and rows.empty:
        parts = [f"{folders.EVALUATIONS} has no usable row"]
    # Evaluations are in either file; the other one tells only how the run ended.
    return ", ".join(parts), rows.empty and any(table.unreadable for _, table in named)


def _file_notes(evaluations: Table, measurements: Table) -> list[Note]:
    notes = []
    for name, table in (
        (folders.EVALUATIONS, evaluations),
        (folders.MEASUREMENTS, measurements),
    ):
        if table.damaged:
            notes.append(
                Note("half-written rows were left out", f"{table.damaged} row(s) of {name}")
            )
        if table.unreadable:
            notes.append(Note("a file was left out", f"{name} {table.problem}"))
    return notes


def _points(rows: pd.DataFrame, target: Target | None) -> pd.DataFrame:
    names = (target.column, target.test_column) if target else ("", "")
    missing = pd.Series(np.nan, index=rows.index, dtype=np.float64)
    return pd.DataFrame(
        {
            "step": rows.get(STEP, missing),
            "seconds": column(rows, _TIME, "score"),
            "value": rows.get(names[0], missing),
            "test_value": rows.get(names[1], missing),
        },
        dtype=np.float64,
    )


def assess(
    identity: Identity,
    path: str,
    rows: pd.DataFrame,
    log: pd.DataFrame,
    ending: Ending,
    *,
    problem: str = "",
    unreadable: bool = False,
    notes: Iterable[Note] = (),
    starts: int = 1,
    hparams: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    targets: Targets | None = None,
) -> Run:
    """Judge one run from its rows, wherever they came from (folder or wandb).

    Args:
        identity: which run it is.
        path: where it was read, for messages.
        rows: evaluations in the order of the log.
        log: all rows, which may hold ``time/*``.
        ending: how its log ends.
        problem: why metrics cannot be had (empty: they can).
        unreadable: the problem is the files' form.
        notes: what was found on reading.
        starts: number of starts that left a file (resumes + 1).
        hparams, meta, flags: the run's JSON files.
        targets: overrides by workload.
    """
    meta, flags = meta or {}, flags or {}
    target, missing = run_target(identity.workload, meta, targets)
    track = follow(_points(rows, target), target)
    budget = run_budget(meta, flags)
    status, evidence = judge(
        track, target, ending, budget, missing or problem, unreadable=unreadable
    )
    found = list(notes)
    if missing:
        found.append(Note("the direction of a metric is not known", missing))
    if track.unusable:
        found.append(Note("rows without a usable global_step were left out", f"{track.unusable}"))
    if track.repeated:
        found.append(
            Note("evaluations logged twice at one step: the later one kept", f"{track.repeated}")
        )
    if track.went_back:
        found.append(Note("the log goes back in steps", f"{track.went_back} time(s)"))
    outer = counts_outer_steps(track, target, budget.seconds, positive(meta, "workload.step_hint"))
    if outer:
        found.append(
            Note("global_step seems to count outer steps only, so steps are not compared", outer)
        )
    crossing = track.crossing
    if crossing and budget.seconds and crossing.seconds > budget.seconds:
        found.append(
            Note("the target was met after the time limit", f"limit {budget.seconds:,.0f} s")
        )
    preemptions = column(rows, "preemption_count").max()
    counted = int(preemptions) if 0 <= preemptions < 1e6 else 0
    parts, part_step = _time_parts(log)
    return Run(
        identity=identity,
        path=path,
        target=target,
        status=status,
        evidence=evidence,
        crossing=crossing,
        test_crossing=track.test_crossing,
        resumes=max(counted, starts - 1, track.went_back),
        steps=track.points["step"].to_numpy(),
        seconds=track.points["seconds"].to_numpy(),
        values=track.points["value"].to_numpy(),
        test_values=track.points["test_value"].to_numpy(),
        time_parts=parts,
        time_steps=part_step,
        hparams=dict(hparams or {}),
        meta=dict(meta),
        flags=dict(flags),
        metrics=tuple(
            name.removeprefix("validation/") for name in rows if name.startswith("validation/")
        ),
        notes=tuple(found),
        steps_comparable=not outer,
        ending=ending,
    )


def read_trial(folder: Path, targets: Targets | None = None) -> tuple[Run, Path]:
    """Read and judge one trial folder; also return the folder that names its method.

    Whatever is in the folder, this gives a run with a status and does not raise.
    """
    metas = folders.numbered_files(folder, "meta_data")
    flag_files = folders.numbered_files(folder, "flags")
    meta, meta_note = folders.read_json(metas[0]) if metas else ({}, "")
    flags, flags_note = folders.read_json(flag_files[0]) if flag_files else ({}, "")
    hparams, hparams_note = folders.read_json(folder / "hparams.json")
    identity, method_folder = folders.identify(folder, flags)
    target, _ = run_target(identity.workload, meta, targets)
    evaluations = tables.read_csv(folder / folders.EVALUATIONS, _wanted(target))
    measurements = tables.read_csv(folder / folders.MEASUREMENTS, _wanted(target))
    rows, notes = _merge(evaluations, measurements, target)
    problem, unreadable = _problem(evaluations, measurements, rows, target)
    notes += [
        Note("a file was left out", text) for text in (meta_note, flags_note, hparams_note) if text
    ]
    run = assess(
        identity,
        str(folder),
        rows,
        measurements.frame,
        find_ending(measurements.frame, known=not measurements.problem),
        problem=problem,
        unreadable=unreadable,
        notes=notes + _file_notes(evaluations, measurements) + _hardware_note(metas),
        starts=max(len(metas), len(flag_files), 1),
        hparams=hparams,
        meta=meta,
        flags=flags,
        targets=targets,
    )
    return run, method_folder


def _hardware_note(metas: list[Path]) -> list[Note]:
    """A note when a resumed run went on with other GPUs."""
    if len(metas) < 2:
        return []
    names = dict.fromkeys(hardware(folders.read_json(path)[0]) for path in metas)
    seen = [name for name in names if name]
    return [Note("resumed on other hardware", ", then ".join(seen))] if len(seen) > 1 else []
