"""The main job: every method, several seeds, one table and one plot of steps and time to target.

    python -m quickstart

Methods and their tuned settings are in quickstart/settings/; runs go to runs/quickstart/ in
AlgoPerf's format, so that `./run.sh compare runs/quickstart` works on them too.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from quickstart import molecules, options, run_logs, runner, search_space, settings, submissions
from quickstart.base_workload import QuickstartWorkload
from quickstart.errors import QuickstartError, run_reporting_errors, writing
from quickstart.parallel import Job, run_jobs
from quickstart.training import RunSettings
from quickstart.workloads import build_workload

DEFAULT_SUBMISSION = options.DEFAULT_SUBMISSION


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        method, seed: what is run.
        point: file with its hyperparameters.
        trial: folder of the run.
        comparison: says its targets.
        state: 'complete' (reused), 'begun' (resumed), 'outdated' (done again) or 'new'.
    """

    comparison: settings.Comparison
    method: str
    seed: int
    point: Path
    trial: Path
    state: str

    @property
    def name(self) -> str:
        """Shown to the user, and the run's experiment name."""
        return f"{self.method}/study_{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns 1 if a run failed, 130 if it was interrupted."""
    given = options.parse(arguments)
    console = console_for_tables()
    study = settings.read_study(given.workload)
    methods = given.methods or study.methods
    seeds = study.seeds if given.seeds is None else given.seeds
    steps = given.max_global_steps or study.max_global_steps
    if given.reference is not None and given.reference not in methods:
        raise QuickstartError(
            f"--reference {given.reference} is not among the methods: {', '.join(methods)}"
        )
    data_dir = given.data_dir
    if given.workload == "molecules":
        data_dir = (data_dir or molecules.DEFAULT_DATA_DIR).expanduser()
        console.print(
            molecules.describe(molecules.prepare(data_dir)), highlight=False, soft_wrap=True
        )
    workload = build_workload(given.workload, data_dir)
    submission = submissions.load(given.submission_path)
    folder = given.experiment_dir.expanduser()
    if given.fresh:
        _delete_runs(folder, methods)
    plan = [
        _plan(
            workload,
            submission,
            given.workload,
            study,
            method,
            seed,
            folder,
            steps,
        )
        for seed in seeds
        for method in methods
    ]
    _explain(plan, folder, console)
    _copy_tuning(given.workload, folder, console)
    console.print(
        f"at most {steps} steps each, {given.jobs} runs at a time; a run ends when it has "
        f"reached its targets of validation and test {workload.target_metric_name}",
        highlight=False,
        soft_wrap=True,
    )
    grid = {"eval_every": study.eval_every, "eval_every_early": study.eval_every_early}
    common = [
        *(f"--{name}={value}" for name, value in grid.items() if value is not None),
        f"--workload={given.workload}",
        f"--submission_path={given.submission_path}",
        f"--experiment_dir={folder}",
        f"--max_global_steps={steps}",
        *([] if data_dir is None else [f"--data_dir={data_dir}"]),
        *(["--use_wandb"] if given.use_wandb else []),
    ]
    jobs = [_job(run, common, folder) for run in plan if run.state != "complete"]
    metric = workload.target_metric_name
    try:
        outcomes = run_jobs(jobs, at_once=given.jobs, steps=steps, metric=metric, console=console)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    for comparison in study.comparisons:
        shown = [m for m in methods if study.comparison_of(m) is comparison]
        if shown:
            reference = given.reference or comparison.reference
            _report(folder, shown, reference if reference in shown else None, console)
    console.print(f"runs, tables and plots: {folder}", highlight=False, soft_wrap=True)
    failed = [outcome.job.name for outcome in outcomes if outcome.code != 0]
    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


def console_for_tables() -> Console:
    """A console that is wide enough for a table where the output goes into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _plan(
    workload: QuickstartWorkload,
    submission: submissions.Submission,
    workload_name: str,
    study: settings.StudySettings,
    method: str,
    seed: int,
    folder: Path,
    steps: int,
) -> PlannedRun:
    comparison = study.comparison_of(method)
    workload.set_targets(comparison.validation_target_value, comparison.test_target_value)
    point = settings.method_file(workload_name, method)
    hyperparameters = search_space.read_points(point, 1, seed)[0]
    run_settings = RunSettings(
        rng_seed=seed,
        batch_size=runner.choose_batch_size(None, workload_name, submission, workload),
        max_global_steps=steps,
        eval_every=study.eval_every or workload.eval_period_steps,
        eval_every_early=study.eval_every_early,
    )
    identity = runner.run_identity(workload, submission, hyperparameters, run_settings)
    parent = run_logs.workload_folder(folder, f"{method}/study_{seed}", workload_name)
    try:
        record = runner.read_record(parent / "trial_1")
    except QuickstartError:
        record = {"damaged": True}
    if not record:
        state = "outdated" if (parent / "trial_1").exists() else "new"
    elif any(record.get(key) != value for key, value in identity.items()):
        state = "outdated"
    else:
        state = "begun" if record.get("stop_reason") is None else "complete"
    return PlannedRun(comparison, method, seed, point, parent / "trial_1", state)


def _job(run: PlannedRun, common: list[str], folder: Path) -> Job:
    how = {"begun": ["--resume_last_run"], "outdated": ["--overwrite"]}.get(run.state, [])
    arguments = [
        *common,
        f"--tuning_search_space={run.point}",
        f"--experiment_name={run.name}",
        f"--validation_target_value={run.comparison.validation_target_value}",
        f"--test_target_value={run.comparison.test_target_value}",
        f"--rng_seed={run.seed}",
        *how,
    ]
    return Job(run.name, arguments, folder / "logs" / f"{run.method}_{run.seed}.log")


def _explain(plan: list[PlannedRun], folder: Path, console: Console) -> None:
    def say(state: str, text: str) -> None:
        count = sum(run.state == state for run in plan)
        if count:
            console.print(f"{count} of {len(plan)} runs {text}", highlight=False, soft_wrap=True)

    say("complete", f"in {folder} are complete (same settings, data and code) and are reused")
    say("begun", "were interrupted and go on from their last checkpoint")
    say("outdated", "were made with other settings, data or code and are done again")


def _delete_runs(folder: Path, methods: list[str]) -> None:
    """Deletes the methods' runs, and refuses to touch anything else."""
    for method in methods:
        for parent in (folder / method).glob("study_*/*_pytorch"):
            run_logs.open_workload_folder(parent, resume=False, overwrite=True)


def _copy_tuning(workload: str, folder: Path, console: Console) -> None:
    """Puts the record of how the settings were tuned beside the runs."""
    record = settings.folder(workload) / "tuning_results.json"
    if not record.exists():
        return
    with writing(folder / "tuning.json") as temporary:
        shutil.copyfile(record, temporary)
    tried = settings.read_json(record)["points"]
    counts: dict[str, int] = {}
    for point in tried:
        counts[point["method"]] = counts.get(point["method"], 0) + 1
    budget = ", ".join(f"{method} {count}" for method, count in counts.items())
    console.print(f"points tried in tuning: {budget} (all in {folder / 'tuning.json'})",
                  highlight=False, soft_wrap=True)  # fmt: skip


def _report(
    folder: Path,
    methods: list[str],
    reference: str | None,
    console: Console,
) -> None:
    """One comparison: its table on the screen and in a file, its plot."""
    from steps_to_target import (
        CompareError,
        load_runs,
        plot_runs,
        render_table,
        render_text,
        summarize,
        write_json,
    )

    name = f"compared_with_{reference}" if reference else "_".join(methods)
    present = [folder / method for method in methods if any((folder / method).glob("study_*"))]
    try:
        runs = load_runs([str(path) for path in present])
        summary = summarize(runs, reference=reference)
        console.print(render_table(summary))
        with writing(folder / f"{name}.txt") as temporary:
            temporary.write_text(render_text(summary, width=110) + "\n", encoding="utf-8")
        write_json(runs, summary, folder / f"{name}.json")
        plot = plot_runs(runs, folder / f"{name}.png")
    except CompareError as error:
        raise QuickstartError(f"cannot compare the runs in {folder}: {error}") from error
    console.print(f"plot: {plot}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_reporting_errors(main)
