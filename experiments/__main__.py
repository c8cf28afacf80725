"""Runs the experiments of the paper.

    python -m experiments                  lists them
    python -m experiments NAME [flags]     runs one
    python -m experiments NAME --paper     runs it at the paper's size (--dry-run: what that is)
    python -m experiments all [--small]    runs all and writes docs/results.md

Each writes one JSON document, and a picture where there is something to see, into
runs/experiments/NAME/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import rich.table
from rich.console import Console

from experiments import page, registry, results
from experiments.paper import command, sizes
from experiments.paper.figures import FIGURES
from experiments.registry import EXPERIMENTS, Experiment
from quickstart.allocator import keep_freed_memory
from quickstart.errors import QuickstartError, run_reporting_errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Lists the experiments, runs one, or runs all; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if not arguments or arguments[0] in ("--help", "-h", "list"):
        _list(console)
        return 0
    keep_freed_memory()
    name, *flags = arguments
    if name == "all":
        return _run_all(flags, console)
    if name == "page":
        return _write_page(flags, console)
    experiment = registry.find(name)
    if experiment is None:
        known = ", ".join(e.name for e in EXPERIMENTS)
        raise QuickstartError(f"no experiment {name!r}; there are: {known}, and `all`, `page`")
    if "--paper" in flags and experiment.name in FIGURES:
        return command.main(experiment.name, [f for f in flags if f != "--paper"], console)
    _run_one(experiment, flags, console)
    return 0


def _list(console: Console) -> None:
    table = rich.table.Table(title="Experiments of the paper", title_justify="left")
    for column in ("name", "paper", "shows", "time on 2 CPU cores", "needs"):
        table.add_column(column)
    for e in EXPERIMENTS:
        table.add_row(e.name, e.paper, e.shows, e.time, e.needs)
    console.print(table)
    console.print(
        "Run one: ./run.sh experiments NAME (flags: NAME --help); at the paper's size: NAME "
        "--paper (what that is: --paper --dry-run). All, with docs/results.md: "
        "./run.sh experiments all --small",
        highlight=False,
        soft_wrap=True,
    )


def _run_one(experiment: Experiment, flags: list[str], console: Console) -> None:
    module = experiment.load()
    parser = argparse.ArgumentParser(
        prog=f"./run.sh experiments {experiment.name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_flags(parser)
    _add_folder(parser)
    if "--paper" in flags:
        if module.PAPER_SIZE is None:
            raise QuickstartError(f"{experiment.name} has one size only: leave --paper out")
        own = [flag for flag in flags if flag != "--paper"]
        given = sizes.start(experiment.name, module.PAPER_SIZE, own, parser, console)
        if given is None:
            return
        flags = given
    options = parser.parse_args(flags)
    folder: Path = options.folder / experiment.name
    start = time.perf_counter()
    result = module.run(options, folder, console)
    settings = {k: v for k, v in vars(options).items() if k != "folder"}
    content = results.document(experiment.name, settings, result, time.perf_counter() - start)
    path = results.write(options.folder, content)
    for table in module.tables(result):
        console.print(table.for_screen())
    picture = folder / "picture.png"
    if not module.draw(result, picture):
        picture.unlink(missing_ok=True)
    console.print(f"result: {path}", highlight=False, soft_wrap=True)


def _run_all(flags: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh experiments all", allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="sizes for half an hour on 2 cores")
    _add_folder(parser)
    page.add_flags(parser)
    options = parser.parse_args(flags)
    failed = []
    chosen = [e for e in EXPERIMENTS if e.in_all]
    for experiment in chosen:
        small = experiment.load().SMALL if options.small else []
        started = [sys.executable, "-m", "experiments", experiment.name, *small]
        shown = " ".join(["./run.sh experiments", experiment.name, *small])
        console.rule(shown)
        # A process of its own: neither memory nor settings of one run reach the next.
        code = subprocess.run(
            [*started, f"--folder={options.folder}"], check=False, cwd=results.ROOT
        ).returncode
        if code:
            failed.append(experiment.name)
    done = [e for e in chosen if e.name not in failed]
    path = page.write(options.folder, done, options.docs)
    console.print(f"results page: {path}", highlight=False, soft_wrap=True)
    if failed:
        print(f"error: these failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _write_page(flags: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh experiments page", allow_abbrev=False)
    _add_folder(parser)
    page.add_flags(parser)
    options = parser.parse_args(flags)
    done = [
        e for e in EXPERIMENTS if e.in_all and results.result_path(options.folder, e.name).exists()
    ]
    path = page.write(options.folder, done, options.docs)
    console.print(f"results page: {path}", highlight=False, soft_wrap=True)
    return 0


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=results.DEFAULT_FOLDER,
                        help="where results go (default: runs/experiments)")  # fmt: skip


if __name__ == "__main__":
    run_reporting_errors(main)
