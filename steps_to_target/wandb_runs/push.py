"""Push runs that lie in folders to wandb; pushing again updates instead of doubling.

A run's wandb id is derived from workload, framework, method, study and trial. The config of a
pushed run holds a digest of all that was pushed: where a run with this id and digest is already
there (on the service, or as an offline folder), nothing is done. Published rows (the paper's, a
leaderboard's) are pushed as runs without a history, so that wandb's tables and bars show them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps_to_target.errors import CompareError
from steps_to_target.model import Identity, Run
from steps_to_target.output.export import plain, run_record
from steps_to_target.summary import Group, Summary, seconds_to_target, step_to_target
from steps_to_target.wandb_runs.names import (
    DESCRIPTION,
    PUBLISHED,
    describe,
    run_group,
    run_id,
    run_name,
    run_tags,
)
from steps_to_target.wandb_runs.read import load_wandb, offline_files, read_records

_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Pushed:
    """What happened: runs written, and runs that were already there unchanged."""

    written: int
    unchanged: int
    offline: bool
    folder: Path

    def __str__(self) -> str:
        text = f"wandb: {self.written} run(s) written, {self.unchanged} already there"
        if self.offline and self.written:
            text += f"; send them later with: wandb sync {self.folder / 'wandb'}/offline-run-*"
        return text


def run_summary(run: Run, summary: Summary) -> dict[str, Any]:
    """What a run's row in wandb's table shows; entries that do not apply are left out.

    ``*_ratio_to_reference`` is this run over the reference method's mean, ``method_*_ratio`` the
    ratio of means with its bootstrap interval.
    """
    own = next(group for group in summary.groups if any(r.path == run.path for r in group.runs))
    beside = {group.method: group for group in summary.of(own.table) if not group.published}
    base = beside.get(summary.reference or "")
    entries: dict[str, float | str | None] = {
        "status": str(run.status),
        "evidence": run.evidence,
        "resumes": run.resumes,
    }
    crossing, test = run.crossing, run.test_crossing
    if crossing:
        entries |= {
            "steps_to_target": crossing.step,
            "steps_to_target_after": crossing.previous_step,
            "seconds_to_target": crossing.seconds,
            "seconds_to_target_after": crossing.previous_seconds,
            "hours_to_target": crossing.seconds / 3600,
        }
    if test:
        entries |= {"test_steps_to_target": test.step, "test_seconds_to_target": test.seconds}
    if base is not None:
        entries["reference"] = base.method
        entries["steps_ratio_to_reference"] = step_to_target(run) / base.steps.mean
        entries["seconds_ratio_to_reference"] = seconds_to_target(run) / base.seconds.mean
    for name, ratio in (("steps", own.ratio_steps), ("seconds", own.ratio_seconds)):
        if ratio is not None:
            entries[f"method_{name}_ratio"] = ratio.value
            entries[f"method_{name}_ratio_low"] = ratio.low
            entries[f"method_{name}_ratio_high"] = ratio.high
    return {
        name: value
        for name, value in entries.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def run_history(run: Run) -> list[dict[str, float]]:
    """Evaluations as rows for ``wandb.log``, and AlgoPerf's final row where the log had one."""
    metric = run.target.metric if run.target else "metric"
    rows = []
    for index, step in enumerate(run.steps):
        row = {
            "global_step": float(step),
            "accumulated_submission_time": float(run.seconds[index]),
            f"validation/{metric}": float(run.values[index]),
            f"test/{metric}": float(run.test_values[index]),
        }
        rows.append({name: value for name, value in row.items() if not math.isnan(value)})
    ending = run.ending
    if ending.final_row and ending.step is not None and ending.seconds is not None:
        rows.append({"global_step": ending.step, "score": ending.seconds})
    return rows


def run_config(run: Run) -> dict[str, Any]:
    """Config: what to filter and group by, the hyperparameters, and the run's JSON files."""
    config = {
        "workload": run.workload,
        "method": run.method,
        "study": run.study,
        "trial": run.trial,
        "framework": run.framework,
        "hyperparameters": dict(run.hparams),
        DESCRIPTION: describe(run.identity, hparams=run.hparams, meta=run.meta, flags=run.flags),
    }
    cleaned: dict[str, Any] = plain(config)
    return cleaned


@dataclass(frozen=True)
class _Row:
    """What becomes one run in wandb.

    Attributes:
        identity: what its id, name, tags and group come from.
        job_type: "study_N", or ``PUBLISHED``.
        record: what else its digest depends on.
    """

    identity: Identity
    job_type: str
    config: dict[str, Any]
    history: list[dict[str, float]]
    entries: dict[str, Any]
    record: Mapping[str, Any]

    def digest(self) -> str:
        """Changes with anything that would be pushed."""
        parts = [self.config, self.history, self.entries, self.record]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _row(run: Run, summary: Summary) -> _Row:
    record = {key: value for key, value in run_record(run).items() if key != "path"}
    config, entries = run_config(run), run_summary(run, summary)
    return _Row(run.identity, f"study_{run.study}"[:64], config, run_history(run), entries, record)


def _published_row(group: Group) -> _Row:
    identity = Identity(group.workload, group.method, "0", "1")
    entries = {
        "status": PUBLISHED,
        "steps_to_target": group.steps.mean,
        "seconds_to_target": group.seconds.mean,
        "hours_to_target": group.seconds.mean / 3600,
    }
    described = {DESCRIPTION: describe(identity, hparams={}, meta={}, flags={})}
    config = {"workload": group.workload, "method": group.method, **described}
    return _Row(identity, PUBLISHED, config, [], entries, {})


def _config_digest(config: Mapping[str, Any]) -> str:
    pushed = config.get(DESCRIPTION)
    return str(pushed.get("digest", "")) if isinstance(pushed, dict) else ""


def _offline_folders(folder: Path, project: str) -> dict[str, list[tuple[Path, str]]]:
    """Offline runs that were pushed before: id -> (folder, digest)."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for file in offline_files(folder / "wandb"):
        if not file.parent.name.startswith("offline-run-"):
            continue
        config, _, names = read_records(file)
        digest = _config_digest(config)
        if digest and config[DESCRIPTION].get("project") == project:
            found.setdefault(names.get("id", ""), []).append((file.parent, digest))
    return found


def _await_offline(folder: Path, identifier: str, digest: str) -> Path:
    """Wait until the pushed run is on disk: wandb's own process writes it after ``finish``.

    Returns:
        Its folder.

    Raises:
        CompareError: it is not complete after ``_PATIENCE`` seconds.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        for file in (folder / "wandb").glob(f"offline-run-*-{identifier}/run-*.wandb"):
            config, _, names = read_records(file)
            if _config_digest(config) == digest and "finished" in names:
                return file.parent
        if time.monotonic() > end:
            raise CompareError(
                f"wandb did not finish writing run {identifier} below {folder / 'wandb'} within "
                f"{_PATIENCE:.0f} s; check the free disk space and push again"
            )
        time.sleep(0.02)


def _service_digest(wandb: Any, path: str) -> str:
    """Digest of the run on the service (empty: no such run)."""
    try:
        return _config_digest(dict(wandb.Api().run(path).config))
    except Exception:  # no such run; a service out of reach shows itself on init
        return ""


def _log(wandb: Any, row: _Row, **names: Any) -> None:
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
    active = wandb.init(
        id=run_id(row.identity),
        name=run_name(row.identity)[:128] if row.job_type != PUBLISHED else row.identity.method,
        group=run_group(row.identity)[:128],
        job_type=row.job_type,
        tags=run_tags(row.identity),
        config=row.config,
        settings=settings,
        reinit="finish_previous",
        **names,
    )
    if active is None:
        raise CompareError("wandb did not start a run; see its messages above")
    try:
        active.define_metric("*", step_metric="global_step")
        # A run that is taken up again keeps its history: only what is new is added.
        start = int(getattr(active, "step", 0) or 0)
        for number, values in enumerate(row.history):
            if number >= start:
                active.log(values, step=number)
        for name, value in row.entries.items():
            active.summary[name] = value
    finally:
        active.finish()


def push_to_wandb(
    runs: Sequence[Run],
    summary: Summary,
    project: str,
    *,
    entity: str | None = None,
    folder: str | os.PathLike[str] = ".",
) -> Pushed:
    """Push runs, and a summary's published rows.

    With ``WANDB_MODE=offline`` they lie in ``<folder>/wandb``, to be synced later. An offline
    folder of an older state of the same run, not yet synced, is replaced.

    Raises:
        CompareError: wandb is missing or disabled, or refuses (its first line of explanation).
    """
    wandb = load_wandb()
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        raise CompareError("WANDB_MODE=disabled: nothing can be pushed; use online or offline")
    offline = mode in ("offline", "dryrun")
    place = Path(folder).expanduser().resolve()
    if not place.is_dir():
        raise CompareError(f"--wandb-dir {folder}: no such folder")
    before = _offline_folders(place, project) if offline else {}
    written = unchanged = 0
    rows = [_row(run, summary) for run in runs]
    for row in [*rows, *(_published_row(group) for group in summary.groups if group.published)]:
        identifier = run_id(row.identity)
        row.config[DESCRIPTION]["project"] = project
        digest = row.digest()
        row.config[DESCRIPTION]["digest"] = digest
        owner = f"{entity}/" if entity else ""
        old = before.get(identifier, [])
        known = [item[1] for item in old]
        if not offline:
            known = [_service_digest(wandb, f"{owner}{project}/{identifier}")]
        if digest in known:
            unchanged += 1
            continue
        names: dict[str, Any] = {"project": project, "entity": entity, "dir": str(place)}
        if not offline:
            names["resume"] = "allow"
        try:
            _log(wandb, row, **names)
        except CompareError:
            raise
        except Exception as error:  # wandb's errors share no base class with its transport's
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CompareError(f"wandb refused: {lines[0]}") from error
        written += 1
        new = _await_offline(place, identifier, digest) if offline else None
        for stale, _ in old:
            if stale != new and not list(stale.glob("*.synced")):
                shutil.rmtree(stale, ignore_errors=True)
    return Pushed(written, unchanged, offline, place)
