"""Several methods, several seeds, one target on the quickstart's data: for Figures 3, 4 and 5.

The runs are the quickstart's (AlgoPerf's call order, clock and log files), the comparison is that
of `steps_to_target`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import cifar, image_tuning, pictures
from experiments.paper.figures import METHODS, Figure
from experiments.tables import Table
from quickstart import molecules, settings
from quickstart.errors import QuickstartError, writing
from quickstart.parallel import Job, run_jobs
from quickstart.study import DEFAULT_SUBMISSION
from quickstart.workloads import build_workload
from steps_to_target import CompareError, Run, load_runs, render_table, summarize
from steps_to_target.statistics import Ratio, Stat


@dataclass(frozen=True)
class Contest:
    """Methods that run to one target.

    Attributes:
        workload: of the quickstart: "molecules" or "images".
        reference: the first-order method.
        points: method -> file with its tuning point, in the order shown; the reference among them.
        validation_target, test_target: of the workload's metric.
        steps: of a run at most.
    """

    workload: str
    reference: str
    points: dict[str, Path]
    validation_target: float
    test_target: float
    steps: int


def of_study(workload: str, methods: tuple[str, ...]) -> Contest:
    """Methods of the quickstart's study, the reference first, on its target."""
    study = settings.read_study(workload)
    comparison = study.comparison_of(methods[0])
    return Contest(
        workload,
        methods[0],
        {method: settings.method_file(workload, method) for method in methods},
        comparison.validation_target_value,
        comparison.test_target_value,
        study.max_global_steps,
    )


def of_tuned_images(methods: tuple[str, ...]) -> Contest:
    """Methods that `image_tuning` has tuned, the reference first, on its target."""
    record = settings.read_json(image_tuning.RECORD)
    return Contest(
        "images",
        image_tuning.REFERENCE,
        {method: image_tuning.point_file(method) for method in methods},
        record["target"],
        record["target"],
        record["steps"],
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Seeds, length, data."""
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    add("--steps", type=int,
        help="of a run at most, and of its schedule (default: the quickstart's)")  # fmt: skip
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    add("--data-dir", type=Path, help="data folder (default: the quickstart's data)")


def run(
    contest: Contest, options: argparse.Namespace, folder: Path, console: Console
) -> dict[str, Any]:
    """Does all runs afresh and compares them.

    Raises:
        QuickstartError: a run failed, or the data are not there.
    """
    data_dir, data = options.data_dir, "scikit-learn's digits"
    if contest.workload == "molecules":
        data_dir = (data_dir or molecules.DEFAULT_DATA_DIR).expanduser()
        data = f"{len(molecules.prepare(data_dir).graphs):,} real molecules"
    workload = build_workload(contest.workload, data_dir)
    if contest.workload == "images" and data_dir is not None:
        # The study's targets and length are those of the digits.
        data = cifar.name_of(data_dir)
        contest = replace(
            contest,
            validation_target=workload.validation_target_value,
            test_target=workload.test_target_value,
            steps=workload.step_hint,
        )
    contest = with_length(contest, options.steps or contest.steps, folder / "points")
    runs = folder.resolve() / "runs"
    common = [
        f"--workload={contest.workload}",
        f"--submission_path={DEFAULT_SUBMISSION}",
        f"--experiment_dir={runs}",
        f"--max_global_steps={contest.steps}",
        f"--validation_target_value={contest.validation_target}",
        f"--test_target_value={contest.test_target}",
        "--nosave_checkpoints",
        "--overwrite",
        *([] if data_dir is None else [f"--data_dir={data_dir.resolve()}"]),
    ]
    jobs = [
        Job(
            f"{method}/study_{seed}",
            [
                *common,
                f"--tuning_search_space={point}",
                f"--experiment_name={method}/study_{seed}",
                f"--rng_seed={seed}",
            ],
            folder / "logs" / f"{method}_{seed}.log",
        )
        for seed in options.seeds
        for method, point in contest.points.items()
    ]
    metric = workload.target_metric_name
    outcomes = run_jobs(
        jobs, at_once=options.jobs, steps=contest.steps, metric=metric, console=console
    )
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    if failed:
        first = failed[0]
        raise QuickstartError(
            f"{len(failed)} runs failed, first {first.job.name}: {first.last_line} "
            f"(log: {first.job.log})"
        )
    places = [runs / job.name for job in jobs]
    return compare(contest, places, metric, data, console)


def with_length(contest: Contest, steps: int, folder: Path) -> Contest:
    """The contest with runs and schedules of so many steps; its points are written to a folder.

    Raises:
        QuickstartError: steps is not 1 or more.
    """
    if steps < 1:
        raise QuickstartError("--steps must be 1 or more")
    points = {}
    for method, path in contest.points.items():
        content = [{**p, "training_steps": steps} for p in settings.read_json(path)]
        points[method] = folder.resolve() / f"{method}.json"
        with writing(points[method]) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return replace(contest, points=points, steps=steps)


def compare(
    contest: Contest, places: list[Path], metric: str, data: str, console: Console
) -> dict[str, Any]:
    """The result of an experiment from its log folders."""
    try:
        loaded = load_runs([str(place) for place in places])
        summary = summarize(loaded, reference=contest.reference)
    except CompareError as error:
        raise QuickstartError(f"cannot compare the runs: {error}") from error
    console.print(render_table(summary))
    groups = {group.method: group for group in summary.groups}
    methods = {}
    for method in contest.points:
        group = groups[method]
        methods[method] = {
            "runs": len(group.runs),
            "reached": group.reached,
            "steps": _stat(group.steps),
            "seconds": _stat(group.seconds),
            "ratio_steps": _ratio(group.ratio_steps),
            "ratio_seconds": _ratio(group.ratio_seconds),
            "curves": [_curve(run) for run in group.runs],
        }
    return {
        "data": data,
        "metric": metric,
        "target": contest.validation_target,
        "reference": contest.reference,
        "methods": methods,
    }


def _stat(stat: Stat) -> list[float] | None:
    return [float(stat.mean), float(stat.stderr)] if stat.n else None


def _ratio(ratio: Ratio | None) -> list[float | None] | None:
    return None if ratio is None else [ratio.value, ratio.low, ratio.high]


def _curve(run: Run) -> dict[str, list[float]]:
    return {
        name: [round(float(value), 5) for value in values]
        for name, values in (("steps", run.steps), ("seconds", run.seconds), ("values", run.values))
    }


def tables(result: dict[str, Any], figure: Figure) -> list[Table]:
    """Steps and time to the target, ratios to the reference; below them the paper's."""

    def stat(value: list[float] | None, digits: int) -> str:
        if value is None:
            return "-"
        mean, error = value
        alone = error != error
        return f"{mean:.{digits}f}" if alone else f"{mean:.{digits}f} ± {error:.{digits}f}"

    def ratio(value: list[float | None] | None) -> str:
        if value is None:
            return "-"
        middle, low, high = value
        interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        return f"{middle:.2f}{interval}"

    rows = []
    for method, m in result["methods"].items():
        is_reference = method == result["reference"]
        ratios = (
            ["1", "1"] if is_reference else [ratio(m["ratio_steps"]), ratio(m["ratio_seconds"])]
        )
        name = f"{method} (reference)" if is_reference else method
        rows.append(
            (name, f"{m['reached']}/{m['runs']}", stat(m["steps"], 0), ratios[0],
             stat(m["seconds"], 1), ratios[1])
        )  # fmt: skip
    rows += [_paper_row(figure, method) for method in METHODS]
    title = f"Target: {result['metric']} {result['target']:g} on {result['data']}, mean ± s.e."
    header = ("", "reached", "steps", "ratio", "seconds", "ratio")
    return [Table(title, header, tuple(rows))]


def _paper_row(figure: Figure, method: str) -> tuple[str, str, str, str, str, str]:
    row, base = figure.row(method), figure.row("reference")

    def stat(mean: float, error: float, digits: int) -> str:
        spread = "" if error != error else f" ± {error:,.{digits}f}"
        return f"{mean:,.{digits}f}{spread}"

    def share(value: float, whole: float) -> str:
        return "1" if row is base else f"{100 * value / whole:.0f} %"

    name = row.label.partition(": ")[2]
    return (
        f"the paper's {name}", f"{figure.seeds}/{figure.seeds}",
        stat(row.steps, row.steps_stderr, 0), share(row.steps, base.steps),
        f"{stat(row.hours, row.hours_stderr, 2)} h", share(row.hours, base.hours),
    )  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> bool:
    """The metric against steps and seconds: a line per run."""
    picture, axes = pictures.figure(2, 1, 9, 3.4)
    for axis, against in zip(axes[0], ("steps", "seconds"), strict=True):
        for number, (method, m) in enumerate(result["methods"].items()):
            for first, curve in enumerate(m["curves"]):
                label = method if first == 0 else None
                axis.plot(curve[against], curve["values"], color=f"C{number}", alpha=0.7,
                          linewidth=1, label=label)  # fmt: skip
        axis.axhline(result["target"], color="grey", linestyle="--", linewidth=1)
        axis.set_xlabel(against)
    axes[0][0].set_ylabel(result["metric"], fontsize=8)
    axes[0][1].legend(fontsize=7)
    pictures.save(picture, path)
    return True
