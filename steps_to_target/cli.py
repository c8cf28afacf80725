"""Command line: ``python -m steps_to_target RUNS... --reference NAME``.

What takes long to import (pandas, scipy, matplotlib) is imported when it is used: ``--help`` and
mistakes in the options need none of it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steps_to_target.errors import CompareError

if TYPE_CHECKING:
    from rich.console import Console

    from steps_to_target.model import Run
    from steps_to_target.summary import Summary

_USAGE_ERROR = 2

_EPILOG = """\
layouts (RUNS may be any level of them, or several):
  <experiment_dir>/<experiment_name>/<workload>_<framework>/trial_*   AlgoPerf's submission_runner
  <method>/study_*/<workload>_<framework>/trial_*                     published logs, quickstart
  wandb/offline-run-*                                                 offline wandb runs
  wandb:ENTITY/PROJECT[/RUN]                                          wandb's service
The method is the experiment's (or submission's) folder name; studies are seeds or repeated tuning.

examples:
  ./run.sh compare runs/latest --reference nesterov --html report.html
  ./run.sh compare logs/shampoo logs/baseline --reference baseline --plot curves.svg
  ./run.sh compare runs --workloads ogbg,imagenet_vit --json result.json --csv runs.csv
  WANDB_MODE=offline ./run.sh compare runs --to-wandb kfac-algoperf

exit status: 0, or 2 with one line on the error output when the request cannot be answered
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Turn argparse's usage error into the package's own."""
        raise CompareError(f"{message} (see ./run.sh compare --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = _Parser(
        prog="./run.sh compare",
        description="Compare training runs: steps and time to the validation target, with the "
        "status of every run, ratios to a reference, and warnings where runs are not comparable.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="folders of runs, or wandb:ENTITY/PROJECT")
    add("--reference", metavar="NAME", help="method that ratios are taken to (a folder's name)")
    add("--workloads", metavar="A,B", help="compare and score on these workloads only")
    add(
        "--target",
        action="append",
        default=[],
        metavar="W:METRIC=VALUE",
        help="validation target of workload W in place of the logged one; <= or >= in place of = "
        "says which way the metric has to go (may be repeated)",
    )
    add("--no-paper", action="store_true", help="leave out the paper's rows")
    add(
        "--leaderboard",
        action="store_true",
        help="also published entries of AlgoPerf's leaderboards, each with its hardware",
    )
    add("--no-runs", action="store_true", help="leave out the table of single runs")
    add("--html", metavar="FILE", help="self-contained page: tables, pictures, hyperparameters")
    add("--plot", metavar="FILE", help="pictures as .png, .svg or .pdf")
    add("--profile-plot", metavar="FILE", help="performance profile as .png, .svg or .pdf")
    add("--json", metavar="FILE", help="everything as JSON")
    add("--csv", metavar="FILE", help="one row per run")
    add(
        "--to-wandb",
        metavar="PROJECT",
        help="push the runs to this wandb project; runs pushed before are updated, not doubled; "
        "with WANDB_MODE=offline nothing is sent and `wandb sync` sends it later",
    )
    add(
        "--wandb-page",
        metavar="PROJECT",
        help="make a page (report) in this wandb project: bars of steps and time to target, of the "
        "runs and published rows that --to-wandb pushed, and curves",
    )
    add("--wandb-entity", metavar="NAME", help="wandb user or team (default: wandb's own)")
    add("--wandb-dir", metavar="DIR", default=".", help="where wandb keeps its files (default: .)")
    return parser


def _chosen(runs: list[Run], names: str | None) -> list[Run]:
    if names is None:
        return runs
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = sorted({run.workload for run in runs})
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise CompareError(
            f"--workloads: no run on {', '.join(unknown) or 'no workload'}; "
            f"these have runs: {', '.join(known)}"
        )
    return [run for run in runs if run.workload in wanted]


def _write(arguments: argparse.Namespace, runs: list[Run], summary: Summary) -> list[Path]:
    from steps_to_target.output.export import write_csv, write_json
    from steps_to_target.scoring import performance_profile

    written = []
    if arguments.json:
        written.append(write_json(runs, summary, arguments.json))
    if arguments.csv:
        written.append(write_csv(runs, arguments.csv))
    if arguments.plot:
        from steps_to_target.output.plots import plot_runs

        written.append(plot_runs(runs, arguments.plot))
    if arguments.profile_plot:
        from steps_to_target.output.plots import plot_profile

        written.append(plot_profile(performance_profile(summary), arguments.profile_plot))
    if arguments.html:
        from steps_to_target.output.report import write_html

        written.append(write_html(runs, summary, arguments.html))
    return written


def _console() -> Console:
    from rich.console import Console

    # A pipe or file has no width: wide enough for the tables rather than rich's 80 columns.
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 150
    return Console(width=width, highlight=False)


def run(argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks.

    Raises:
        CompareError: the request cannot be answered.
    """
    arguments = build_parser().parse_args(argv)
    from steps_to_target.output.text import render_profile, render_table
    from steps_to_target.reading.load import load
    from steps_to_target.scoring import performance_profile
    from steps_to_target.summary import summarize
    from steps_to_target.targets import parse_override

    targets = dict(parse_override(text) for text in arguments.target)
    loaded = load(arguments.runs, targets=targets)
    runs = _chosen(loaded.runs, arguments.workloads)
    summary = summarize(
        runs,
        arguments.reference,
        paper=not arguments.no_paper,
        leaderboard=arguments.leaderboard,
        notes=loaded.notes,
    )
    written = _write(arguments, runs, summary)
    console = _console()
    console.print(render_table(summary, runs=not arguments.no_runs))
    if len({item.method for item in runs}) > 1:
        console.print(render_profile(performance_profile(summary)))
    for path in written:
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    if arguments.to_wandb:
        from steps_to_target.wandb_runs.push import push_to_wandb

        pushed = push_to_wandb(
            runs,
            summary,
            arguments.to_wandb,
            entity=arguments.wandb_entity,
            folder=arguments.wandb_dir,
        )
        console.print(str(pushed), soft_wrap=True, markup=False)
    if arguments.wandb_page:
        from steps_to_target.wandb_runs.page import save_page

        address = save_page(summary, arguments.wandb_page, arguments.wandb_entity)
        console.print(f"wandb: {address}", soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on the error output."""
    for stream in (sys.stdout, sys.stderr):
        # A folder's name need not be valid text, nor can every terminal show a ± sign.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        run(argv)
    except CompareError as error:
        print(f"steps_to_target: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: nothing is wrong with the comparison.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("steps_to_target: interrupted", file=sys.stderr)
        return 130
    return 0


def command() -> None:
    """Entry point: runs the command line and leaves with its exit status."""
    sys.exit(main())
