"""A page (report) in a wandb project: steps and time to target, and curves, workload by workload.

It shows what ``push`` put there: one's own runs beside the published rows. wandb-workspaces is
imported when needed; making the page needs wandb's service.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from steps_to_target.errors import CompareError
from steps_to_target.summary import Summary

TITLE = "Steps and time to target"


def _blocks(wr: Any, summary: Summary, project: str, entity: str) -> list[Any]:
    blocks: list[Any] = []
    for workload in summary.workloads:
        target = next((g.target for g in summary.of(workload) if g.target), None)
        metric = f"validation/{target.metric}" if target else "validation/loss"
        runs = {"entity": entity, "project": project}
        chosen = wr.Runset(
            name=workload,
            filters=f"Config('workload') = '{workload}'",
            groupby=["config.method"],
            **runs,
        )
        bars = [
            wr.BarPlot(title=title, metrics=[wr.SummaryMetric(name)], groupby=wr.Config("method"))
            for title, name in (
                ("steps to target", "steps_to_target"),
                ("hours to target", "hours_to_target"),
            )
        ]
        curves = [
            wr.LinePlot(title=metric, x=wr.Metric(x), y=[wr.Metric(metric)])
            for x in ("global_step", "accumulated_submission_time")
        ]
        blocks += [
            wr.H2(f"{workload}: {target.text if target else 'no target known'}"),
            wr.PanelGrid(runsets=[chosen], panels=[*bars, *curves]),
        ]
    return blocks


def make_page(summary: Summary, project: str, entity: str | None = None) -> Any:
    """The page, not saved.

    Raises:
        CompareError: wandb-workspaces is not installed.
    """
    try:
        wr: Any = import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise CompareError(
            f"wandb-workspaces cannot be imported ({error}); install it: pip install "
            "wandb-workspaces"
        ) from error
    owner = entity or ""
    return wr.Report(
        project=project, entity=owner, title=TITLE, blocks=_blocks(wr, summary, project, owner)
    )


def save_page(summary: Summary, project: str, entity: str | None = None) -> str:
    """Saves the page in the project; returns its address.

    Raises:
        CompareError: wandb-workspaces is missing, or wandb's service refuses.
    """
    page = make_page(summary, project, entity)
    try:
        page.save()
    except Exception as error:  # wandb's errors share no base class with those of its transport
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompareError(f"wandb refused the page: {lines[0]}") from error
    return str(page.url)
