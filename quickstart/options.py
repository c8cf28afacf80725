"""The study's command line. Needs no package, so that --help works before set-up."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SUBMISSION = ROOT / "submission" / "submission.py"
WORKLOADS = ("molecules", "images")
DESCRIPTION = """Every method, several seeds, one table and one plot of steps and time to target.

Methods, their tuned settings and the targets are in quickstart/settings/; runs go to
runs/quickstart/ in AlgoPerf's format, so that `./run.sh compare runs/quickstart` works on them too.
"""


def default_runs() -> Path:
    """Where runs go: in a container the folder that outlives it, else runs/ of this project."""
    return Path(os.environ.get("KFAC_RUNS_DIR") or ROOT / "runs") / "quickstart"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse ends the process on a mistake."""
    parser = argparse.ArgumentParser(
        prog="./run.sh quickstart",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, default="molecules")
    add("--methods", nargs="+", metavar="METHOD", help="methods to run (default: all of the study)")
    add("--seeds", nargs="+", type=_seed, metavar="N", help="seeds (default: the study's)")
    add("--reference", metavar="METHOD", help="method to compare with (default: the study's)")
    add("--max_global_steps", "--max-global-steps", type=_positive, help="steps of a run at most")
    add("--jobs", type=_positive, default=2, help="runs at a time, one thread each (default: 2)")
    add("--data_dir", "--data-dir", type=Path, help="data folder (default: data/ of this project)")
    add("--experiment_dir", "--experiment-dir", type=Path, default=default_runs(),
        help="where runs go (default: runs/quickstart of this project)")  # fmt: skip
    add("--submission_path", "--submission-path", type=Path, default=DEFAULT_SUBMISSION)
    add("--use_wandb", "--use-wandb", action="store_true",
        help="also log the runs to wandb (WANDB_MODE=offline works)")  # fmt: skip
    add("--fresh", action="store_true", help="delete and repeat runs that exist already")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value
