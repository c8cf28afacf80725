"""Tunes methods on a workload: every point of a grid, each result kept.

    python -m quickstart.tuning --methods nesterov nadamw

The grids are in quickstart/settings/<workload>/tuning.json: for each method `grid`, the values of
the hyperparameters that vary, or `points`, a list of such choices; whatever they leave out is taken
from the method's own settings. Points are ranked by steps to target, then by the best value of the
validation metric. The result of every point goes to tuning.json in the experiment folder.
"""

import argparse
import csv
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from quickstart import molecules, run_logs, settings
from quickstart.errors import QuickstartError, run_reporting_errors, writing
from quickstart.parallel import Job, Outcome, run_jobs
from quickstart.study import DEFAULT_SUBMISSION, console_for_tables
from quickstart.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tried:
    """A point and its result.

    Attributes:
        steps_to_target, seconds_to_target: at the first evaluation above the validation target,
            None if there is none.
        best_value, last_value: of the validation metric, None if there was no evaluation.
        problem: last line of a run that failed, else None.
    """

    method: str
    hyperparameters: dict[str, Any]
    seed: int
    steps_to_target: int | None
    seconds_to_target: float | None
    best_value: float | None
    last_value: float | None
    problem: str | None

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better."""
        steps = math.inf if self.steps_to_target is None else self.steps_to_target
        return steps, -math.inf if self.best_value is None else -self.best_value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the grids; returns 130 if interrupted."""
    options = _parse(arguments)
    console = console_for_tables()
    study = settings.read_study(options.workload)
    if options.workload == "molecules":
        molecules.prepare((options.data_dir or molecules.DEFAULT_DATA_DIR).expanduser())
    grids = read_grids(options.workload, options.methods)
    target = options.validation_target_value or max(
        comparison.validation_target_value for comparison in study.comparisons
    )
    steps = options.max_global_steps or study.max_global_steps
    folder = options.experiment_dir.expanduser()
    common = [
        f"--workload={options.workload}",
        f"--submission_path={options.submission_path}",
        f"--experiment_dir={folder}",
        f"--max_global_steps={steps}",
        f"--validation_target_value={target}",
        f"--test_target_value={target}",
        f"--rng_seed={options.seed}",
        "--nosave_checkpoints",
        "--overwrite",
        *(["--nostop_at_target"] if options.full_length else []),
        *([] if options.data_dir is None else [f"--data_dir={options.data_dir}"]),
    ]
    metric = WORKLOADS[options.workload].target_metric_name
    points = {
        f"{method}/point_{index}": (method, point)
        for method, grid in grids.items()
        for index, point in enumerate(grid)
    }
    jobs = []
    for name, (_, point) in points.items():
        file = folder / "points" / f"{name.replace('/', '_')}.json"
        with writing(file) as temporary:
            temporary.write_text(json.dumps([point], indent=2), encoding="utf-8")
        log = folder / "logs" / f"{name.replace('/', '_')}.log"
        given = [f"--tuning_search_space={file}", f"--experiment_name={name}"]
        jobs.append(Job(name, [*common, *given], log))
    tried: list[Tried] = []

    def keep(outcome: Outcome) -> None:
        method, point = points[outcome.job.name]
        trial = run_logs.workload_folder(folder, outcome.job.name, options.workload) / "trial_1"
        problem = None if outcome.code == 0 else outcome.last_line
        tried.append(_result(method, point, options.seed, trial, metric, target, problem))
        _write(folder, options, steps, target, tried)

    try:
        run_jobs(
            jobs, at_once=options.jobs, steps=steps, metric=metric, console=console, on_end=keep
        )
    except KeyboardInterrupt:
        print(f"interrupted: results so far are in {folder / 'tuning.json'}", file=sys.stderr)
        return 130
    console.print(_table(tried, grids))
    if options.write_settings:
        for method in grids:
            best = min((t for t in tried if t.method == method), key=lambda t: t.rank)
            with writing(settings.folder(options.workload) / f"{method}.json") as temporary:
                text = json.dumps([best.hyperparameters], indent=2) + "\n"
                temporary.write_text(text, encoding="utf-8")
    console.print(f"all {len(tried)} points: {folder / 'tuning.json'}", highlight=False)
    return 0


def read_grids(workload: str, methods: list[str] | None) -> dict[str, list[dict[str, Any]]]:
    """The points to try for each method, complete with what the method's settings add.

    Raises:
        QuickstartError: if a method has no grid, or the file is not as described above.
    """
    path = settings.folder(workload) / "tuning.json"
    content = settings.read_json(path)
    unknown = [method for method in methods or [] if method not in content]
    if unknown:
        raise QuickstartError(f"{path} has no grid for {unknown[0]}; it has: {', '.join(content)}")
    grids = {}
    for method in methods or content:
        base = settings.read_json(settings.method_file(workload, method))[0]
        match content[method]:
            case {"grid": dict(grid)}:
                choices = [
                    dict(zip(grid, values, strict=True))
                    for values in itertools.product(*grid.values())
                ]
            case {"points": list(choices)}:
                pass
            case _:
                raise QuickstartError(f'{path}: {method} needs "grid" or "points"')
        strangers = {name for choice in choices for name in choice} - base.keys()
        if strangers:
            raise QuickstartError(f"{path}: {method} has no hyperparameter {sorted(strangers)[0]}")
        grids[method] = [{**base, **choice} for choice in choices]
    return grids


def _result(
    method: str,
    point: dict[str, Any],
    seed: int,
    trial: Path,
    metric: str,
    target: float,
    problem: str | None,
) -> Tried:
    rows: list[dict[str, str]] = []
    file = trial / run_logs.EVAL_MEASUREMENTS
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    values = [float(row[f"validation/{metric}"]) for row in rows]
    finite = [value for value in values if math.isfinite(value)]
    met = next((row for row, value in zip(rows, values, strict=True) if value > target), None)
    return Tried(
        method=method,
        hyperparameters=point,
        seed=seed,
        steps_to_target=None if met is None else int(met["global_step"]),
        seconds_to_target=None if met is None else float(met["accumulated_submission_time"]),
        best_value=max(finite, default=None),
        last_value=finite[-1] if finite and math.isfinite(values[-1]) else None,
        problem=problem,
    )


def _write(
    folder: Path, options: argparse.Namespace, steps: int, target: float, tried: list[Tried]
) -> None:
    content = {
        "workload": options.workload,
        "max_global_steps": steps,
        "validation_target_value": target,
        "points": [asdict(t) for t in sorted(tried, key=lambda t: (t.method, *t.rank))],
    }
    run_logs.write_json(folder / "tuning.json", content)


def _table(tried: list[Tried], grids: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("method", "varied", "steps to target", "best value", title="tuning, best first")
    for method, grid in grids.items():
        varied = [n for n in grid[0] if len({json.dumps(point[n]) for point in grid}) > 1]
        for t in sorted((t for t in tried if t.method == method), key=lambda t: t.rank):
            table.add_row(
                method,
                ", ".join(f"{name}={t.hyperparameters[name]}" for name in varied),
                "failed" if t.problem else str(t.steps_to_target or "-"),
                "-" if t.best_value is None else f"{t.best_value:.4f}",
            )
    return table


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quickstart.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="molecules")
    add("--methods", nargs="+", metavar="METHOD", help="methods to tune (default: all with a grid)")
    add("--seed", type=int, default=100, help="seed of all runs, not one of the study's")
    add("--max_global_steps", "--max-global-steps", type=int, help="steps per point")
    add("--validation_target_value", "--validation-target-value", type=float)
    add("--full_length", "--full-length", action="store_true", help="do not stop at the target")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    add("--data_dir", "--data-dir", type=Path)
    add("--experiment_dir", "--experiment-dir", type=Path,
        default=ROOT / "runs" / "quickstart_tuning")  # fmt: skip
    add("--submission_path", "--submission-path", type=Path, default=DEFAULT_SUBMISSION)
    add("--write_settings", "--write-settings", action="store_true",
        help="put each method's best point into its settings")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
