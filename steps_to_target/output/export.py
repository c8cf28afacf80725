"""The comparison as JSON and CSV, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steps_to_target.errors import CompareError
from steps_to_target.model import Crossing, Run
from steps_to_target.reading.metadata import hardware
from steps_to_target.scoring import performance_profile
from steps_to_target.statistics import Ratio, Stat
from steps_to_target.summary import Group, Summary


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file under a temporary name in its folder and rename it.

    Raises:
        CompareError: the folder does not exist or cannot be written to, or the disk is full.
    """
    target = Path(path).expanduser()
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise CompareError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def plain(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinity become null, other objects text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | int | bool) or value is None:
        return value
    return str(value)


def _whole(step: float) -> int | float:
    return int(step) if step.is_integer() else step


def _crossing(crossing: Crossing | None) -> dict[str, Any] | None:
    if crossing is None:
        return None
    return {
        "step": _whole(crossing.step),
        "seconds": crossing.seconds,
        "value": crossing.value,
        "previous_step": None if crossing.previous_step is None else _whole(crossing.previous_step),
        "previous_seconds": crossing.previous_seconds,
    }


def run_record(run: Run) -> dict[str, Any]:
    """One run, for JSON and wandb."""
    record = {
        "workload": run.workload,
        "framework": run.framework,
        "method": run.method,
        "study": run.study,
        "trial": run.trial,
        "path": run.path,
        "status": str(run.status),
        "evidence": run.evidence,
        "metric": run.target.metric if run.target else None,
        "validation_target": run.target.validation if run.target else None,
        "test_target": run.target.test if run.target else None,
        "lower_is_better": run.target.lower_is_better if run.target else None,
        "target_source": run.target.source if run.target else None,
        "validation": _crossing(run.crossing),
        "test": _crossing(run.test_crossing),
        "resumes": run.resumes,
        "evaluations": len(run.steps),
        "steps_comparable": run.steps_comparable,
        "hardware": hardware(run.meta),
        "seconds_by_part": dict(run.time_parts),
        "hyperparameters": dict(run.hparams),
        "notes": [str(note) for note in run.notes],
    }
    cleaned: dict[str, Any] = plain(record)
    return cleaned


def _stat(stat: Stat, published: bool) -> dict[str, Any]:
    return {
        "reached": None if published else stat.n,
        "total": None if published else stat.total,
        "mean": stat.mean,
        "standard_error": stat.stderr,
        "median": stat.median,
    }


def _ratio(ratio: Ratio | None) -> dict[str, Any] | None:
    if ratio is None:
        return None
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def group_record(group: Group) -> dict[str, Any]:
    """One method on one workload, for JSON. A median that is null was not reached."""
    record = {
        "workload": group.workload,
        "target": group.target.text if group.target else None,
        "method": group.method,
        "published": group.published,
        "is_reference": group.is_reference,
        "runs": len(group.runs),
        "runs_reached": group.reached,
        "fraction_reached": group.reached / len(group.runs) if group.runs else None,
        "statuses": dict(group.statuses),
        "mean_over": group.repetitions,
        "steps": _stat(group.steps, group.published),
        "seconds": _stat(group.seconds, group.published),
        "ratio_steps": _ratio(group.ratio_steps),
        "ratio_seconds": _ratio(group.ratio_seconds),
        "algoperf_steps": group.algoperf_steps,
        "algoperf_seconds": group.algoperf_seconds,
    }
    cleaned: dict[str, Any] = plain(record)
    return cleaned


def write_json(
    runs: Sequence[Run],
    summary: Summary,
    path: str | os.PathLike[str],
    *,
    workloads: Sequence[str] | None = None,
) -> Path:
    """Write runs, methods, warnings and the benchmark scores as one JSON file."""
    scores = {}
    for measure in ("seconds", "steps"):
        profile = performance_profile(summary, workloads, measure=measure)
        scores[measure] = {
            "workloads": list(profile.workloads),
            "scores": profile.scores,
            "ratios_to_best": profile.ratios,
            "without_runs": list(profile.absent),
        }
    document = {
        "reference": summary.reference,
        "methods": [group_record(group) for group in summary.groups],
        "runs": [run_record(run) for run in runs],
        "benchmark_score": plain(scores),
        "warnings": list(summary.warnings),
        "warnings_in_full": list(summary.cautions),
        "paper_notes": list(summary.paper_notes),
    }
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    return write_atomically(path, (text + "\n").encode("utf-8", errors="replace"))


CSV_COLUMNS = (
    "workload",
    "framework",
    "method",
    "study",
    "trial",
    "status",
    "metric",
    "validation_target",
    "steps_to_target",
    "steps_before",
    "seconds_to_target",
    "seconds_before",
    "value_at_target",
    "test_target",
    "test_steps_to_target",
    "test_seconds_to_target",
    "resumes",
    "evaluations",
    "steps_comparable",
    "hardware",
    "hyperparameters",
    "evidence",
    "notes",
    "path",
)


def write_csv(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write one row per run; an empty cell means not reached or not logged."""
    rows = []
    for run in runs:
        record = run_record(run)
        validation, test = record["validation"] or {}, record["test"] or {}
        rows.append(
            record
            | {
                "steps_to_target": validation.get("step"),
                "steps_before": validation.get("previous_step"),
                "seconds_to_target": validation.get("seconds"),
                "seconds_before": validation.get("previous_seconds"),
                "value_at_target": validation.get("value"),
                "test_steps_to_target": test.get("step"),
                "test_seconds_to_target": test.get("seconds"),
                "hyperparameters": json.dumps(record["hyperparameters"], sort_keys=True),
                "notes": "; ".join(record["notes"]),
            }
        )
    text = pd.DataFrame(rows, columns=CSV_COLUMNS, dtype=object).to_csv(index=False)
    return write_atomically(path, text.encode("utf-8", errors="replace"))
