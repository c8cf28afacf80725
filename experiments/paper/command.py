"""`./run.sh experiments ogbg --paper` and the like: a figure's runs, on AlgoPerf itself."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments import results
from experiments.paper import figures
from experiments.paper.figures import Extra, Figure, Run
from experiments.tables import Table
from quickstart.errors import QuickstartError
from workloads_overrides import data_folders, slurm
from workloads_overrides.errors import LaunchError

FINISHED = "finished"  # in the trial's folder: the command that ended there without an error
EPILOG = """
Runs whose folder exists go on from their last checkpoint, those that have finished are left out: an
interrupted command is given again as it was. Behind a `--` come arguments of ./run.sh algoperf
itself: its options, and after another `--` flags of AlgoPerf's submission runner, for example
  ./run.sh experiments ogbg --paper --gpus 1 -- --miniature --batch-size 16 -- --max_global_steps=20
"""


def main(name: str, flags: Sequence[str], console: Console) -> int:
    """Plans a figure's runs, and prints or starts them; returns the exit code.

    Raises:
        QuickstartError: something is missing, or cannot be sent.
    """
    figure = figures.FIGURES[name]
    cut = flags.index("--") if "--" in flags else len(flags)
    options = _parser(figure).parse_args(list(flags[:cut]))
    extra = Extra.split(flags[cut + 1 :])
    data_dir = figures.shown_path(options.data_dir)
    folder = figures.shown_path(options.runs_dir)
    folder = folder.with_name(f"{folder.name}_search") if options.search else folder
    gpus = options.gpus or figure.gpus
    runs = list(figures.plan(figure, options.seeds, options.search, data_dir, folder, extra))
    missing = _missing(figure, data_dir)
    console.print(_head(figure, options, runs, gpus, missing), highlight=False, soft_wrap=True)
    console.print(_table(figure, runs).for_screen())
    if options.compare:
        return _compare(figure, folder, options.search)
    methods = list(dict.fromkeys(run.method for run in runs))
    slurm_arguments = {
        method: _slurm_arguments(figure, method, options, data_dir, folder, extra)
        for method in methods
    }
    if options.dry_run:
        for method in methods if options.slurm is not None else ():
            print(f"NPROC={gpus} {shlex.join(['./run.sh', 'slurm', *slurm_arguments[method]])}")
        for run in runs if options.slurm is None else ():
            print(run.command(gpus))
        print(shlex.join(_comparison(figure, folder, options.search)))
        return 0
    if missing is not None:
        raise QuickstartError(f"{missing}; {data_folders.how_to_get(figure.workload, data_dir)}")
    if options.slurm is not None:
        return _send(figure, options, slurm_arguments, gpus, folder)
    _check_gpus(options.gpus, figure.gpus)
    return _run_all(figure, runs, gpus, folder, options.search)


def _parser(figure: Figure) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"./run.sh experiments {figure.name} --paper",
        description=f"Figure {figure.number} of the paper: AlgoPerf's {figure.workload} with the "
        "paper's settings (workloads_overrides/paper), the reference included.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=results.DEFAULT_DATA_DIR / figure.data,
        help=f"AlgoPerf's data (default: data/{figure.data})")  # fmt: skip
    add("--runs-dir", type=Path, default=results.ROOT / "runs" / "paper" / figure.name,
        help=f"where runs go (default: runs/paper/{figure.name})")  # fmt: skip
    add("--seeds", type=_positive, default=figure.seeds, metavar="N",
        help=f"runs of each method (default: the paper's {figure.seeds})")  # fmt: skip
    add("--gpus", type=_positive, metavar="N",
        help=f"of a run (default: the paper's {figure.gpus})")  # fmt: skip
    add("--slurm", nargs="?", const="", metavar="OPTIONS",
        help="send the runs to a Slurm cluster, one job each; OPTIONS of ./run.sh slurm, such as "
        "--slurm '--partition gpu --time 24:00:00'")  # fmt: skip
    add("--compare", action="store_true", help="only compare the runs that there are")
    add("--dry-run", action="store_true", help="print the exact commands, and stop")
    if figure.searched:
        add("--search", action="store_true",
            help=f"the search before: {figures.SEARCH_TRIALS} trials of each approximation in the "
            "paper's search space")  # fmt: skip
    else:
        parser.set_defaults(search=False)
    return parser


# ---- what is printed ---------------------------------------------------------------------------


def _head(
    figure: Figure, options: argparse.Namespace, runs: Sequence[Run], gpus: int, missing: str | None
) -> str:
    methods = len({run.method for run in runs})
    how = (
        f"{methods} searches x {figures.SEARCH_TRIALS} trials"
        if options.search
        else f"{methods} methods x {options.seeds} seeds x 1 trial"
    )
    place = "one after the other here" if options.slurm is None else "as jobs of a Slurm cluster"
    hours = figures.hours_in_all(figure, runs)
    return "\n".join(
        [
            f"Figure {figure.number}: AlgoPerf's {figure.workload}",
            f"runs   {how} = {len(runs)}, {place}",
            f"GPUs   {gpus} for each run; the paper's: {figure.gpus} V100 with 32 GB; "
            f"here: {torch.cuda.device_count()}",
            f"hours  {hours:,.0f} in all, at the paper's hours to the target",
            f"data   {options.data_dir}: {missing or 'complete'}",
        ]
    )


def _table(figure: Figure, runs: Sequence[Run]) -> Table:
    def cell(value: float, error: float, digits: int) -> str:
        spread = "" if error != error else f" ± {error:,.{digits}f}"
        return f"{value:,.{digits}f}{spread}"

    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        row = figure.row(method)
        settings = str(figures.SETTINGS / figure.name / f"{method}.json")
        steps = cell(row.steps, row.steps_stderr, 0)
        hours = cell(row.hours, row.hours_stderr, 2)
        rows.append((figure.experiment_name(method), settings, steps, hours))
    header = ("method", "settings", "steps of a run", "hours of a run")
    return Table("What the paper's runs took to the target, mean ± s.e.", header, tuple(rows))


# ---- checks ------------------------------------------------------------------------------------


def _missing(figure: Figure, data_dir: Path) -> str | None:
    v2 = next((f for f in (data_dir, data_dir.parent) if (f / "imagenet_v2").is_dir()), None)
    return data_folders.first_missing(figure.workload, results.ROOT / data_dir, v2)


def _check_gpus(asked: int | None, wanted: int) -> None:
    """Too few GPUs are an error, unless their number was given."""
    present = torch.cuda.device_count()
    if asked is None and present < wanted:
        raise QuickstartError(
            f"the paper's runs have {wanted} GPUs each, this machine has {present}: --gpus N takes "
            "another number (the batch size stays), --slurm sends the runs to a cluster"
        )


# ---- running here ------------------------------------------------------------------------------


def _run_all(figure: Figure, runs: Sequence[Run], gpus: int, folder: Path, search: bool) -> int:
    failed = []
    for number, run in enumerate(runs, start=1):
        mark = _trial(figure, run, folder) / FINISHED
        command = run.command(gpus)
        print(f"[{number}/{len(runs)}] {command}", flush=True)
        if mark.is_file() and mark.read_text(encoding="utf-8") == command:
            print("finished before", flush=True)
            continue
        done = subprocess.run(
            [str(results.ROOT / "run.sh"), "algoperf", *run.arguments],
            check=False,
            cwd=results.ROOT,
            env={**os.environ, "NPROC": str(gpus)},
        )
        if done.returncode:
            failed.append(run.name)
        elif mark.parent.is_dir():
            mark.write_text(command, encoding="utf-8")
    if len(failed) < len(runs):
        _compare(figure, folder, search)
    if failed:
        print(f"error: these failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _trial(figure: Figure, run: Run, folder: Path) -> Path:
    """The folder that AlgoPerf makes for a run."""
    workload = f"{figure.workload}_pytorch"
    return results.ROOT / folder / run.name / workload / f"trial_{run.trial}"


def _comparison(figure: Figure, folder: Path, search: bool) -> list[str]:
    reference = [] if search else ["--reference", figure.experiment_name("reference")]
    return ["./run.sh", "compare", str(folder), *reference]


def _compare(figure: Figure, folder: Path, search: bool) -> int:
    """The comparison with the paper's rows, in this environment; returns its exit code."""
    _, _, *arguments = _comparison(figure, folder, search)
    command = [sys.executable, "-m", "steps_to_target", *arguments]
    return subprocess.run(command, check=False, cwd=results.ROOT).returncode


# ---- sending to a cluster ----------------------------------------------------------------------


def _slurm_arguments(
    figure: Figure,
    method: str,
    options: argparse.Namespace,
    data_dir: Path,
    folder: Path,
    extra: Extra,
) -> list[str]:
    """Of `./run.sh slurm`, which adds seeds, trials and the names of studies itself."""
    name = figure.experiment_name(method)
    common = figures.arguments(figure, method, name, data_dir, folder, extra)
    if options.search:
        repeated = []
        common.append(f"--num_tuning_trials={figures.SEARCH_TRIALS}")
    else:
        repeated = ["--studies", str(options.seeds)]
    return [*shlex.split(options.slurm or ""), *repeated, "--", *common]


def _send(
    figure: Figure,
    options: argparse.Namespace,
    by_method: dict[str, list[str]],
    gpus: int,
    folder: Path,
) -> int:
    os.chdir(results.ROOT)  # which the paths are below
    sent: list[tuple[slurm.Study, list[Any]]] = []
    waits = False
    try:
        for method, given in by_method.items():
            parsed, argv = slurm.parse_options(given)
            study = slurm.make_study(parsed, argv, {**os.environ, "NPROC": str(gpus)})
            jobs = slurm.submit(study, local=parsed.local)
            for trial, job in zip(study.trials, jobs, strict=True):
                print(f"{figure.experiment_name(method)}/{trial.name}: job {job.job_id}")
            sent.append((study, jobs))
            waits = parsed.wait or parsed.local
    except LaunchError as error:
        raise QuickstartError(str(error)) from error
    if not waits:
        command = shlex.join(_comparison(figure, folder, options.search))
        print(f"when they are done: {command}")
        return 0
    failed = sum(slurm.wait(study, jobs) for study, jobs in sent)
    _compare(figure, folder, options.search)
    return 1 if failed else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)
