"""The command `python -m experiments optimizers`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments import results
from experiments.optimizers import logs, report, study, timing
from experiments.optimizers.draw import curves
from experiments.optimizers.logs import Log
from experiments.optimizers.methods import METHODS, find, point_key
from experiments.optimizers.summary import group
from experiments.optimizers.tasks import DEFAULT, NAMES, make_task
from experiments.optimizers.tasks import SMALL as SMALL_SIZES
from experiments.tables import Table
from quickstart.errors import QuickstartError

SMALL = ["--small", "--tasks", "molecules", "--seeds", "2"]
PAPER_SIZE = None  # not in the paper
PAPER = """
Not in the paper. All figures, with every point that was tried: [optimizers.md](optimizers.md).
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which runs, how long, on which data."""
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="TASK", choices=NAMES, default=list(NAMES),
        help=f"of {', '.join(NAMES)} (default: all)")  # fmt: skip
    add("--methods", nargs="+", metavar="METHOD", choices=tuple(METHODS), default=list(METHODS),
        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--phases", nargs="+", choices=study.PHASES, default=list(study.PHASES[:-1]),
        help="default: all but the ablation")  # fmt: skip
    add("--seeds", type=int, default=3, help="number of seeds after tuning (default: 3)")
    add("--steps", type=int, help="length of every run (default: the task's own)")
    add("--small", action="store_true", help="tiny nets and short runs, to try the command")
    add("--timing-rounds", type=int, default=5, help="rounds of 10 steps each (default: 5)")
    add("--image-dir", "--data-dir", type=Path, dest="image_dir",
        help="CIFAR-10 as python batches, image folder or packed JPEGs; default: the digits that "
        "scikit-learn carries")  # fmt: skip
    add("--downloads", type=Path, default=results.DEFAULT_DATA_DIR,
        help="folder for molecules and text from the package registry (default: data)")  # fmt: skip
    add("--continue", action="store_true", dest="go_on",
        help="begin with the runs that docs/optimizers.md was made from")  # fmt: skip
    add("--device", default=results.default_device())


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Does the runs that have no log yet, phase by phase."""
    if options.seeds < 1 or options.timing_rounds < 1 or (options.steps or 1) < 1:
        raise QuickstartError("--seeds, --steps and --timing-rounds must be 1 or more")
    sizes = SMALL_SIZES if options.small else DEFAULT
    device = torch.device(options.device)
    tasks = [
        make_task(name, sizes, downloads=options.downloads, image_dir=options.image_dir,
                  steps=options.steps, device=device)
        for name in options.tasks
    ]  # fmt: skip
    plan = study.Study(folder / "runs", tasks, options.methods, range(1, options.seeds + 1))

    if options.go_on:
        taken = logs.unpack(results.ROOT / "docs" / "data" / "optimizers.jsonl.gz", plan.folder)
        console.print(f"{taken} runs are taken over")

    def tell(number: int, total: int, log: Log) -> None:
        value = "-" if log.best is None else f"{log.best:.4f}"
        trouble = f", ended early: {log.outcome.problem}" if log.outcome.problem else ""
        console.print(
            f"{number}/{total} {log.run.task} {log.run.method} seed {log.run.seed}: {value} in "
            f"{log.outcome.seconds:.1f} s{trouble}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    if "tuning" in options.phases:
        study.do_all(plan.folder, plan.tuning(), tell)
    if "seeds" in options.phases:
        study.do_all(plan.folder, plan.after_tuning(), tell)
    if "timing" in options.phases:
        for task in tasks:
            points = {
                name: point
                for name in options.methods
                if (point := study.chosen_point(plan.folder, task, find(name)))
            }
            if set(points) - set(timing.read(plan.folder, task.name, task.setting)):
                timing.write(plan.folder, task, points, options.timing_rounds)
    if "search_space" in options.phases:
        study.do_all(plan.folder, plan.search_space(), tell)
    if "ablation" in options.phases:
        study.do_all(plan.folder, plan.ablation(), tell)
    return {"logs": str(plan.folder), "settings": [task.setting for task in tasks]}


def tables(result: dict[str, Any]) -> list[Table]:
    """All tables of the logs in the result's folder that belong to its settings."""
    folder = Path(result["logs"])
    return report.tables(_of_settings(folder, result["settings"]), folder)


def draw(result: dict[str, Any], path: Path) -> bool:
    """The metric over steps."""
    return curves(_of_settings(Path(result["logs"]), result["settings"]), path)


def _of_settings(folder: Path, settings: list[dict[str, Any]]) -> list[Any]:
    wanted = {point_key(setting) for setting in settings}
    found = [log for log in logs.read_all(folder) if point_key(log.run.setting) in wanted]
    return group(found)
