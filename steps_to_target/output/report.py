"""One self-contained HTML page: tables, pictures inline, every run's hyperparameters."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from steps_to_target.model import Run
from steps_to_target.output import text
from steps_to_target.output.export import write_atomically
from steps_to_target.output.plots import figure_bytes, profile_figure, table_figure
from steps_to_target.output.report_template import PAGE
from steps_to_target.reading.metadata import hardware
from steps_to_target.scoring import Profile, performance_profile
from steps_to_target.summary import Group, Summary

_METHOD_NUMBERS = (2, 3, 4, 5, 6)


def _picture(figure: Figure) -> str:
    return base64.b64encode(figure_bytes(figure, "png")).decode("ascii")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _two_lines(cell: str) -> str:
    return cell.replace(" (after ", "\n(after ")


def _run(run: Run) -> dict[str, Any]:
    return {
        "method": run.method,
        "study": run.study,
        "trial": run.trial,
        "reached": run.reached,
        "status": str(run.status),
        "step": _two_lines(text.crossing_step(run.crossing)),
        "time": _two_lines(text.crossing_time(run.crossing)),
        "test_step": _two_lines(text.crossing_step(run.test_crossing)),
        "resumes": run.resumes,
        "evidence": "; ".join((run.evidence, *map(str, run.notes))),
        "hardware": hardware(run.meta),
        "hparams": [(str(name), _value(value)) for name, value in run.hparams.items()],
        "path": run.path,
    }


def _kind(group: Group) -> str:
    if group.published:
        return "published"
    return "reference" if group.is_reference else ""


def _profile(profile: Profile) -> dict[str, Any]:
    rows = [
        [
            method,
            f"{profile.scores[method]:.4f}",
            *(
                f"{ratio:.3f}" if math.isfinite(ratio) else "not reached"
                for ratio in profile.ratios[method].values()
            ),
        ]
        for method in sorted(profile.scores, key=lambda name: -profile.scores[name])
    ]
    return {
        "workloads": profile.workloads,
        "absent": profile.absent,
        "rows": rows,
        "picture": _picture(profile_figure(profile)),
    }


def render_page(runs: Sequence[Run], summary: Summary, title: str) -> str:
    """The page as text; everything that came from logs is escaped."""
    methods = sorted({run.method for run in runs})
    workloads = []
    for number, table in enumerate(summary.tables):
        groups = summary.of(table)
        rows = zip(groups, text.method_rows(groups), strict=True)
        workloads.append(
            {
                "name": table,
                "anchor": f"table-{number}",
                "title": text.table_title(summary, table),
                "methods": [{"kind": _kind(group), "cells": cells} for group, cells in rows],
                "picture": _picture(
                    table_figure(table, [r for g in groups for r in g.runs], methods)
                ),
                "runs": [_run(run) for group in groups for run in group.runs],
            }
        )
    profile = _profile(performance_profile(summary)) if len(methods) > 1 else None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE).render(
        title=title,
        reference=summary.reference,
        run_count=len(runs),
        method_count=len(methods),
        method_columns=text.METHOD_COLUMNS,
        method_numbers=_METHOD_NUMBERS,
        workloads=workloads,
        warnings=summary.warnings,
        notes=summary.paper_notes,
        profile=profile,
    )


def write_html(
    runs: Sequence[Run],
    summary: Summary,
    path: str | os.PathLike[str],
    *,
    title: str = "Steps and time to target",
) -> Path:
    """Write the page.

    Args:
        runs: from ``load_runs``.
        summary: from ``summarize`` over the same runs.
        path: the file.
        title: heading of the page.

    Raises:
        CompareError: the file cannot be written.
    """
    page = render_page(runs, summary, title)
    return write_atomically(path, page.encode("utf-8", errors="replace"))
