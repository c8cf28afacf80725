"""Tables for the terminal (rich) and as plain text."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from steps_to_target.model import Crossing, Run
from steps_to_target.scoring import MAX_TAU, Profile
from steps_to_target.statistics import Ratio, Stat
from steps_to_target.summary import Group, Summary

DASH = "-"
_HOURS_FROM = 7200.0
_WIDE = 150
_NARROW = 100
_ABSENT_SHOWN = 6
_SECOND_LINE = re.compile(r" (?=± |\[|\(after |\(\d+ [a-z])")
_INTERVAL_COMMA = re.compile(r"(?<=\d), (?=\d)")


def in_hours(groups: list[Group]) -> bool:
    """Whether times of these groups read better in hours than in seconds; published ones aside."""
    own = [group.seconds.mean for group in groups if not group.published]
    means = [mean for mean in own if not math.isnan(mean)]
    return bool(means) and max(means) >= _HOURS_FROM


def plain_number(value: float) -> str:
    """Thousands separated; a dash for NaN or infinity."""
    if not math.isfinite(value):
        return DASH
    return f"{value:,.0f}"


def duration(seconds: float, hours: bool = False) -> str:
    """Seconds with one decimal, or hours with two; a dash for NaN or infinity."""
    if not math.isfinite(seconds):
        return DASH
    return f"{seconds / 3600:,.2f} h" if hours else f"{seconds:,.1f} s"


def mean_steps(stat: Stat) -> str:
    """``mean ± standard error`` of steps."""
    if not stat.n:
        return DASH
    spread = "" if math.isnan(stat.stderr) else f" ± {plain_number(stat.stderr)}"
    return plain_number(stat.mean) + spread


def mean_time(stat: Stat, hours: bool) -> str:
    """``mean ± standard error`` of time."""
    if not stat.n:
        return DASH
    if math.isnan(stat.stderr):
        return duration(stat.mean, hours)
    unit = 3600.0 if hours else 1.0
    digits = 2 if hours else 1
    name = "h" if hours else "s"
    return f"{stat.mean / unit:,.{digits}f} ± {stat.stderr / unit:,.{digits}f} {name}"


def ratio_text(ratio: Ratio | None, is_reference: bool = False, percent: bool = False) -> str:
    """``0.52 [0.45, 0.60]``; ``1`` for the reference itself; ``51 %`` as the paper has it."""
    if is_reference:
        return "1"
    if ratio is None:
        return DASH
    if percent:
        return f"{100 * ratio.value:.0f} %"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def reached_text(group: Group) -> str:
    """``3/5`` and how the others ended."""
    if group.published:
        return DASH
    others = [f"{count} {name}" for name, count in group.statuses.items() if name != "reached"]
    return f"{group.reached}/{len(group.runs)}" + (f" ({', '.join(others)})" if others else "")


def algoperf_time(group: Group, hours: bool) -> str:
    """Median over studies of the fastest trial, in which a miss is infinite."""
    if group.published or math.isnan(group.algoperf_seconds):
        return DASH
    if math.isfinite(group.algoperf_seconds):
        return duration(group.algoperf_seconds, hours)
    return "no time logged" if group.reached and not group.seconds.n else "not reached"


def table_title(summary: Summary, table: str) -> str:
    """Workload and what has to be reached on it."""
    group = summary.of(table)[0]
    return f"{group.workload}: {group.target.text if group.target else 'no target known'}"


def method_rows(groups: list[Group]) -> list[list[str]]:
    """Cells of the table of methods, one row per group."""
    hours = in_hours(groups)
    return [
        [
            group.method + (" (reference)" if group.is_reference and not group.published else ""),
            reached_text(group),
            mean_steps(group.steps),
            ratio_text(
                group.ratio_steps, group.is_reference and group.steps.n > 0, group.published
            ),
            mean_time(group.seconds, hours or group.published),
            ratio_text(
                group.ratio_seconds, group.is_reference and group.seconds.n > 0, group.published
            ),
            algoperf_time(group, hours),
            group.repetitions,
        ]
        for group in groups
    ]


METHOD_COLUMNS = (
    "method",
    "runs reached",
    "steps to target",
    "ratio",
    "time to target",
    "ratio",
    "AlgoPerf time",
    "mean over",
)


def crossing_step(crossing: Crossing | None) -> str:
    """``10,138 (after 9,205)``: the true crossing lies between the two."""
    if crossing is None:
        return DASH
    text = plain_number(crossing.step)
    if crossing.previous_step is not None:
        text += f" (after {plain_number(crossing.previous_step)})"
    return text


def crossing_time(crossing: Crossing | None) -> str:
    """``2,652.8 s (after 2,414.7 s)``."""
    if crossing is None or math.isnan(crossing.seconds):
        return DASH
    text = duration(crossing.seconds)
    if crossing.previous_seconds is not None:
        text += f" (after {duration(crossing.previous_seconds)})"
    return text


RUN_COLUMNS = ("run", "status", "step", "time", "test step", "resumes")
MAX_RUNS_SHOWN = 60


def run_row(run: Run) -> list[str]:
    """Cells of the table of runs."""
    return [
        f"{run.method} study {run.study} trial {run.trial}",
        str(run.status),
        crossing_step(run.crossing),
        crossing_time(run.crossing),
        crossing_step(run.test_crossing),
        str(run.resumes),
    ]


def _run_parts(table: str, members: list[Run], width: int) -> list[RenderableType]:
    """Table of single runs, and for those that did not reach the evidence for their status."""
    shown = members[:MAX_RUNS_SHOWN]
    title = f"{table}: single runs (the true crossing lies after the evaluation in brackets)"
    kept = len(RUN_COLUMNS) - (0 if width >= _NARROW else 2)
    rows = [run_row(run)[:kept] for run in shown]
    parts: list[RenderableType] = [
        Text(title, style="bold"),
        _table(RUN_COLUMNS[:kept], rows, {2, 3, 4, 5}, width),
    ]
    parts += [
        Text(f"{run.method} study {run.study} trial {run.trial}: {run.status}: {run.evidence}")
        for run in shown
        if not run.reached
    ]
    if len(members) > len(shown):
        parts.append(Text(f"... and {len(members) - len(shown)} more runs: see --csv or --html"))
    return parts


def _stacked(cell: str, width: int) -> str:
    """``8,421 ± 608`` on two lines where room is short, an interval on two where it is scarce."""
    if width >= _WIDE:
        return cell
    cell = _SECOND_LINE.sub("\n", cell)
    return cell if width >= _NARROW else _INTERVAL_COMMA.sub(",\n", cell)


def _table(columns: tuple[str, ...], rows: list[list[str]], right: set[int], width: int) -> Table:
    """A table in which numbers stay whole and names give way."""
    rows = [[_stacked(cell, width) for cell in row] for row in rows]
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for index, name in enumerate(columns):
        number = index in right
        longest = max((len(row[index]) for row in rows), default=0)
        least = 20 if index == 0 and width >= _WIDE else 11
        table.add_column(
            name if width >= _WIDE else name.replace(" to target", ""),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number,
            min_width=None if number else min(longest, least),
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


@dataclass(frozen=True)
class Comparison:
    """The comparison as a rich renderable that fits itself to the width there is."""

    summary: Summary
    runs: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        summary, width = self.summary, options.max_width
        # Without room the last two columns go; the JSON, CSV and HTML files have everything.
        kept = len(METHOD_COLUMNS) - (0 if width >= _WIDE else 2)
        for table in summary.tables:
            groups = summary.of(table)
            yield Text(table_title(summary, table), style="bold")
            rows = [row[:kept] for row in method_rows(groups)]
            yield _table(METHOD_COLUMNS[:kept], rows, {2, 3, 4, 5, 6}, width)
            if self.runs:
                yield from _run_parts(table, [run for g in groups for run in g.runs], width)
        yield from (Text(f"note: {note}") for note in summary.paper_notes)
        yield from (Text(f"warning: {text}", style="yellow") for text in summary.warnings)


def render_table(summary: Summary, *, runs: bool = False) -> Comparison:
    """The comparison as a rich renderable: per workload one table of methods.

    Args:
        summary: from ``summarize``.
        runs: also a table of single runs, and the evidence for those that did not reach.
    """
    return Comparison(summary, runs)


@dataclass(frozen=True)
class Scores:
    """AlgoPerf's benchmark score of each method as a rich renderable that fits its width."""

    profile: Profile

    def _rows(self, ratios: bool) -> tuple[tuple[str, ...], list[list[str]]]:
        profile = self.profile
        ordered = sorted(profile.scores, key=lambda name: -profile.scores[name])
        rows = []
        for method in ordered:
            own = profile.ratios[method]
            within = sum(ratio <= MAX_TAU for ratio in own.values())
            cells = [method, f"{profile.scores[method]:.4f}", f"{within}/{len(own)}"]
            if ratios:
                cells += [f"{r:.3f}" if math.isfinite(r) else DASH for r in own.values()]
            rows.append(cells)
        names = tuple(f"{workload} ratio" for workload in profile.workloads) if ratios else ()
        return ("method", "score", f"within {MAX_TAU:g}x", *names), rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        profile, width = self.profile, options.max_width
        yield Text(
            f"AlgoPerf benchmark score by {profile.measure} to target over "
            f"{len(profile.workloads)} workload(s): {', '.join(profile.workloads)}",
            style="bold",
        )
        columns, rows = self._rows(ratios=True)
        widths = [max(map(len, cells)) + 2 for cells in zip(columns, *rows, strict=True)]
        fits = sum(widths) <= width
        if not fits:
            columns, rows = self._rows(ratios=False)
        yield _table(columns, rows, set(range(1, len(columns))), _WIDE)
        if not fits:
            yield Text("each workload's ratio to the best method: --json or --html")
        if profile.absent:
            shown = "; ".join(profile.absent[:_ABSENT_SHOWN])
            more = len(profile.absent) - _ABSENT_SHOWN
            yield Text(
                f"no runs, counted as not reached: {shown}" + (f"; {more} more" if more > 0 else "")
            )


def render_profile(profile: Profile) -> Scores:
    """AlgoPerf's benchmark score of each method, with the workloads named."""
    return Scores(profile)


def to_text(renderable: RenderableType, width: int = 120) -> str:
    """Render without colour, with trailing blanks removed."""
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False, legacy_windows=False).print(
        renderable
    )
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def render_text(summary: Summary, *, width: int = 120, runs: bool = False) -> str:
    """The comparison as plain text."""
    return to_text(render_table(summary, runs=runs), width)
