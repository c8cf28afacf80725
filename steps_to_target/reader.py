"""Read runs: one trial folder, or everything below some paths."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps_to_target import csvfile, folders
from steps_to_target.csvfile import CsvTable, Row, finite
from steps_to_target.errors import CompareError
from steps_to_target.judge import Budget, counts_outer_steps, find_ending, follow, judge
from steps_to_target.model import TIME_PARTS, Ending, Identity, Run
from steps_to_target.targets import Target, run_target

# AlgoPerf v0.6 gives self-tuning submissions 1.5 times the workload's time limit.
_SELF_TUNING_FACTOR = 1.5
WANDB_PREFIX = "wandb:"
_COLUMNS = {
    "accumulated_submission_time",
    "global_step",
    "loss",
    "preemption_count",
    "score",
    "total_duration",
}


def positive(mapping: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named entries that is a finite number above zero."""
    for name in names:
        value = mapping.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number) and number > 0:
                return number
    return None


def run_budget(meta: Mapping[str, Any], flags: Mapping[str, Any]) -> Budget:
    """Time limit and step budget of a run, from its meta data and flags."""
    seconds = positive(meta, "workload.max_allowed_runtime_sec")
    if seconds is not None and flags.get("tuning_ruleset") == "self":
        seconds *= _SELF_TUNING_FACTOR
    return Budget(seconds, positive(flags, "max_global_steps"))


def _time_parts(rows: Sequence[Row]) -> tuple[dict[str, float], float]:
    """Cumulative seconds by part of a step from the last row that has them, and its step."""
    for row in reversed(rows):
        parts = {}
        for part in TIME_PARTS:
            value = finite(row, f"time/{part}")
            if value is not None and value >= 0:
                parts[part] = value
        if parts:
            step = finite(row, "global_step")
            return parts, math.nan if step is None else step
    return {}, math.nan


def _wanted(target: Target | None) -> Callable[[str], bool]:
    """Which columns of the logs are needed to judge a run."""
    metrics = {target.column, target.test_column} if target else set()

    def wanted(name: str) -> bool:
        if name in _COLUMNS or name in metrics or name.startswith("time/"):
            return True
        return target is None and name.startswith("validation/")

    return wanted


def _is_evaluation(row: Row, target: Target | None) -> bool:
    if target is not None:
        return target.column in row
    return any(name.startswith("validation/") for name in row)


def _merge(
    evaluations: CsvTable, measurements: CsvTable, target: Target | None
) -> tuple[list[Row], str]:
    """Evaluation rows, completed from measurements.csv where eval_measurements.csv lacks some.

    AlgoPerf writes each evaluation to both files. The order of the log is kept: the rows of the
    evaluation file stay where they are; evaluations that only measurements.csv has replace the
    list when they are more.
    """
    own = evaluations.rows
    other = [row for row in measurements.rows if _is_evaluation(row, target)]
    if not measurements.whole or len(other) <= sum(_is_evaluation(row, target) for row in own):
        return own, ""
    known = {(row.get("global_step"), row.get("preemption_count", 0.0)): row for row in own}
    merged = [
        known.get((row.get("global_step"), row.get("preemption_count", 0.0)), row) for row in other
    ]
    return merged, (
        f"{len(other) - len(own)} evaluation(s) missing from {folders.EVALUATIONS} were taken from "
        f"{folders.MEASUREMENTS}"
    )


def _needs_whole(evaluations: CsvTable, tail: CsvTable, target: Target | None) -> bool:
    """Whether the whole measurements.csv must be read: evaluations or times are missing."""
    if tail.whole or tail.problem:
        return False
    if evaluations.problem or evaluations.damaged or not evaluations.rows:
        return True
    if any(name.startswith("time/") for name in tail.columns) and not _time_parts(tail.rows)[0]:
        return True
    steps = {row.get("global_step") for row in evaluations.rows}
    return any(
        _is_evaluation(row, target) and row.get("global_step") not in steps for row in tail.rows
    )


def _problem(
    evaluations: CsvTable, measurements: CsvTable, rows: list[Row], target: Target | None
) -> str:
    """Why no metric can be had, for the evidence (empty: it can)."""
    if target is not None and rows and not any(target.column in row for row in rows):
        columns = evaluations.columns or measurements.columns
        if target.column in columns:
            return f"{target.column} is never a number"
        have = ", ".join(name for name in columns if name.startswith("validation/")) or "none"
        return f"no column {target.column} in the log (validation columns: {have})"
    parts = [
        f"{name} {table.problem}"
        for name, table in (
            (folders.EVALUATIONS, evaluations),
            (folders.MEASUREMENTS, measurements),
        )
        if table.problem
    ]
    if not parts and not rows:
        parts = [f"{folders.EVALUATIONS} has no usable row"]
    if rows and not any("global_step" in row for row in rows):
        parts.append("no column global_step")
    return ", ".join(parts)


def _damage_notes(evaluations: CsvTable, measurements: CsvTable) -> list[str]:
    return [
        f"{table.damaged} half-written row(s) of {name} left out"
        for name, table in (
            (folders.EVALUATIONS, evaluations),
            (folders.MEASUREMENTS, measurements),
        )
        if table.damaged
    ]


def assess(
    identity: Identity,
    path: str,
    rows: list[Row],
    ending: Ending,
    *,
    problem: str = "",
    notes: Iterable[str] = (),
    starts: int = 1,
    time_rows: Sequence[Row] = (),
    hparams: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    targets: Mapping[str, Target] | None = None,
) -> Run:
    """Judge one run from its rows, wherever they came from (folder or wandb).

    Args:
        identity: which run it is.
        path: where it was read, for messages.
        rows: evaluations in the order of the log.
        ending: how its log ends.
        problem: why metrics cannot be had (empty: they can).
        notes: what was found on reading.
        starts: number of starts that left a file (resumes + 1).
        time_rows: rows that may hold ``time/*``.
        hparams, meta, flags: the run's JSON files.
        targets: overrides by workload.
    """
    meta, flags = meta or {}, flags or {}
    target = run_target(identity.workload, meta, targets)
    track = follow(rows, target)
    budget = run_budget(meta, flags)
    status, evidence = judge(track, target, ending, budget, problem)
    found = list(notes)
    if track.unusable:
        found.append(f"{track.unusable} row(s) without a usable global_step left out")
    if track.repeated:
        found.append(f"{track.repeated} evaluation(s) logged twice at one step, the later one kept")
    if track.went_back:
        found.append(f"the log goes back in steps {track.went_back} time(s)")
    outer = counts_outer_steps(track, target, budget.seconds, positive(meta, "workload.step_hint"))
    if outer:
        found.append(outer)
    crossing = track.crossing
    if crossing and budget.seconds and crossing.seconds > budget.seconds:
        found.append(f"the target was met after the time limit of {budget.seconds:,.0f} s")
    preemptions = max((row.get("preemption_count", 0.0) for row in rows), default=0.0)
    counted = int(preemptions) if math.isfinite(preemptions) and 0 <= preemptions < 1e6 else 0
    parts, part_step = _time_parts(time_rows)
    return Run(
        identity=identity,
        path=path,
        target=target,
        status=status,
        evidence=evidence,
        crossing=crossing,
        test_crossing=track.test_crossing,
        resumes=max(counted, starts - 1, track.went_back),
        steps=track.column("step"),
        seconds=track.column("seconds"),
        values=track.column("value"),
        test_values=track.column("test_value"),
        time_parts=parts,
        time_steps=part_step,
        hparams=dict(hparams or {}),
        meta=dict(meta),
        flags=dict(flags),
        notes=tuple(found),
        steps_comparable=not outer,
        ending=ending,
    )


def read_trial(folder: Path, targets: Mapping[str, Target] | None = None) -> tuple[Run, Path]:
    """Read and judge one trial folder; also return the folder that names its method.

    Whatever is in the folder, this gives a run with a status and does not raise.
    """
    metas = folders.numbered_files(folder, "meta_data")
    flag_files = folders.numbered_files(folder, "flags")
    meta, meta_note = folders.read_json(metas[0]) if metas else ({}, "")
    flags, flags_note = folders.read_json(flag_files[0]) if flag_files else ({}, "")
    hparams, hparams_note = folders.read_json(folder / "hparams.json")
    identity, method_folder = folders.identify(folder, flags)
    target = run_target(identity.workload, meta, targets)
    wanted = _wanted(target)
    evaluations = csvfile.read_csv(folder / folders.EVALUATIONS, wanted=wanted)
    measurements = csvfile.read_csv(folder / folders.MEASUREMENTS, wanted=wanted, tail=True)
    if _needs_whole(evaluations, measurements, target):
        measurements = csvfile.read_csv(folder / folders.MEASUREMENTS, wanted=wanted)
    rows, merge_note = _merge(evaluations, measurements, target)
    ending = find_ending(measurements.rows, known=not measurements.problem)
    notes = [text for text in (meta_note, flags_note, hparams_note, merge_note) if text]
    run = assess(
        identity,
        str(folder),
        rows,
        ending,
        problem=_problem(evaluations, measurements, rows, target),
        notes=notes + _damage_notes(evaluations, measurements) + _hardware_note(metas),
        starts=max(len(metas), len(flag_files), 1),
        time_rows=measurements.rows,
        hparams=hparams,
        meta=meta,
        flags=flags,
        targets=targets,
    )
    return run, method_folder


def _hardware_note(metas: list[Path]) -> list[str]:
    """A note when a resumed run went on with other GPUs."""
    if len(metas) < 2:
        return []
    seen: list[str] = []
    for path in metas:
        name = hardware(folders.read_json(path)[0])
        if name and name not in seen:
            seen.append(name)
    return [f"resumed on other hardware: {', then '.join(seen)}"] if len(seen) > 1 else []


def hardware(meta: Mapping[str, Any]) -> str:
    """``"8 x Tesla V100-SXM2-16GB"``, or the CPU where there is no GPU (empty: not logged)."""
    gpu, count = meta.get("gpu_model_name"), meta.get("gpu_count")
    if isinstance(gpu, str) and gpu:
        return f"{count} x {gpu}" if isinstance(count, int) else gpu
    cpu, cores = meta.get("cpu_model_name"), meta.get("cpu_count")
    if isinstance(cpu, str) and cpu:
        return f"CPU {cpu}" + (f", {cores} cores" if isinstance(cores, int) else "")
    return ""


def load_runs(
    paths: Iterable[str | os.PathLike[str]], *, targets: Mapping[str, Target] | None = None
) -> list[Run]:
    """Read all runs at or below the given paths.

    Args:
        paths: folders at any level (trial, workload, study, method, or a parent of several), log
            files, offline wandb folders, or ``"wandb:ENTITY/PROJECT[/RUN]"`` for the wandb service.
        targets: targets by workload that replace the logged ones.

    Returns:
        Runs sorted by workload, method, study and trial.

    Raises:
        CompareError: a path does not exist, or there is no run in any of them.
    """
    given = [os.fspath(path) for path in paths]
    if not given:
        raise CompareError("no folder given; name at least one folder of runs")
    found: dict[str, tuple[Run, Path]] = {}
    for text in given:
        if text.startswith(WANDB_PREFIX):
            from steps_to_target import wandb_read

            for run in wandb_read.read_service(text[len(WANDB_PREFIX) :], targets):
                found[run.path] = (run, Path(run.path))
            continue
        path = Path(text).expanduser()
        trials = folders.find_trials(path)
        for folder in trials:
            if str(folder) not in found:
                found[str(folder)] = read_trial(folder, targets)
        if not trials:
            from steps_to_target import wandb_read

            for run in wandb_read.read_offline(path, targets):
                found[run.path] = (run, Path(run.path).parent)
    if not found:
        raise CompareError(
            f"no run found in {', '.join(given)}: looked for trial_*/{folders.EVALUATIONS} below "
            "<method>/study_*/<workload>_<framework>/ or <experiment>/<workload>_<framework>/, and "
            "for offline wandb runs"
        )
    entries = list(found.values())
    identities = folders.disambiguate([(run.identity, place) for run, place in entries])
    runs = [
        replace(run, identity=identity)
        for (run, _), identity in zip(entries, identities, strict=True)
    ]
    return sorted(runs, key=lambda run: _order(run.identity))


def _order(identity: Identity) -> tuple[Any, ...]:
    def natural(text: str) -> tuple[int, int, str]:
        # isdecimal and a bound: "²" is a digit but no int, and int() refuses 5,000 digits.
        return (0, int(text), "") if text.isdecimal() and len(text) < 18 else (1, 0, text)

    return (identity.workload, identity.method, natural(identity.study), natural(identity.trial))
