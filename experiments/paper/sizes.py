"""`--paper` for the tables: the flags of the paper's size, checked, printed, run or sent away."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from experiments import cifar, results
from quickstart.errors import QuickstartError
from workloads_overrides import slurm
from workloads_overrides.errors import LaunchError
from workloads_overrides.slurm_trial import Trial

FOLDER = results.ROOT / "runs" / "paper"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


@dataclass(frozen=True)
class PaperSize:
    """What the paper ran for a table.

    Attributes:
        table: in words.
        flags: of the experiment.
        runs: what they amount to, in words.
        hardware: the paper's.
        time: what the paper reports of it, in words.
        missing: what data are missing, in words, for the experiment's options; None if none are.
    """

    table: str
    flags: tuple[str, ...]
    runs: str
    hardware: str
    time: str
    missing: Callable[[argparse.Namespace], str | None]

    def describe(self, missing: str | None) -> str:
        """What will be run, and whether it can be."""
        return "\n".join(
            [
                self.table,
                f"runs   {self.runs}",
                f"GPUs   1; the paper's: {self.hardware}; here: {torch.cuda.device_count()}",
                f"hours  the paper's: {self.time}",
                f"data   {missing or 'complete'}",
            ]
        )


def missing_cifar(options: argparse.Namespace) -> str | None:
    """Whether --data-dir holds CIFAR-10, in one of the forms of `cifar.load`."""
    if options.data_dir is None:
        return f"CIFAR-10 is missing: --data-dir DIR, with {CIFAR_URL} (170 MB) unpacked in it"
    try:
        cifar.load(options.data_dir)
    except QuickstartError as error:
        return str(error)
    return None


def start(
    name: str,
    size: PaperSize,
    flags: Sequence[str],
    parser: argparse.ArgumentParser,
    console: Console,
) -> list[str] | None:
    """The flags to run the experiment with, or None if there is nothing (more) to run here.

    Args:
        name: of the experiment.
        size: the paper's.
        flags: the user's own, which come last and so win.
        parser: of the experiment's flags.

    Raises:
        QuickstartError: data or a GPU is missing, or the job cannot be sent.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--dry-run", action="store_true")
    own.add_argument("--slurm", nargs="?", const="")
    asked, rest = own.parse_known_args(list(flags))
    given = [f"--folder={_short(FOLDER)}", *size.flags, *rest]
    options = parser.parse_args(given)
    missing = size.missing(options)
    console.print(size.describe(missing), highlight=False, soft_wrap=True)
    command = ["./run.sh", "experiments", name, *given]
    if asked.dry_run:
        there = [] if asked.slurm is None else [f"sbatch {asked.slurm}".strip() + ":"]
        print(*there, shlex.join(command))
        return None
    if missing is not None:
        raise QuickstartError(missing)
    if asked.slurm is not None:
        _send(name, command, asked.slurm)
        return None
    if not torch.cuda.is_available() and not any(f.startswith("--device") for f in rest):
        raise QuickstartError("no GPU here: --slurm sends it to a cluster, --device=cpu insists")
    return given


def _short(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _send(name: str, command: Sequence[str], text: str) -> None:
    """Sends the command as one job; it goes on where it can when it is queued again."""
    try:
        # A stand-in for the arguments of ./run.sh algoperf, which parse_options asks for.
        options, _ = slurm.parse_options([*shlex.split(text), "--gpus=1", "--", name])
        folder = options.folder or FOLDER / "slurm_jobs" / name
        # The job runs where this does, so that relative paths keep their meaning.
        script = str(results.ROOT / "run.sh")
        trial = Trial(name, (script, *command[1:]), 1, os.getcwd())
        parameters = slurm.job_parameters(options, name, processes=1, gpus=1)
        study = slurm.Study([trial], folder.absolute(), parameters)
        jobs = slurm.submit(study, local=options.local)
        print(f"{name}: job {jobs[0].job_id}, output {jobs[0].paths.stdout}")
        if (options.wait or options.local) and slurm.wait(study, jobs):
            raise QuickstartError("the job failed, see its output")
    except LaunchError as error:
        raise QuickstartError(str(error)) from error
    print("when it is done, the result and the paper's numbers are in its output", file=sys.stderr)
