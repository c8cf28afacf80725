"""Trains one submission on one small workload, with AlgoPerf's argument names and log files.

    python -m quickstart.runner --workload=molecules --submission_path=submission/submission.py \\
        --tuning_search_space=quickstart/settings/molecules/nesterov.json \\
        --experiment_dir=runs --experiment_name=nesterov/study_0 --rng_seed=0
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from quickstart import locks, run_logs, search_space, submissions
from quickstart.allocator import keep_freed_memory
from quickstart.base_workload import QuickstartWorkload
from quickstart.checkpoints import list_checkpoints
from quickstart.errors import QuickstartError, explain_os_error, run_reporting_errors
from quickstart.reporting import choose_reporter
from quickstart.training import InterruptedRunError, RunSettings, TrainingRun
from quickstart.workloads import WORKLOADS, build_workload

# Flags of this program alone: AlgoPerf's runner may be imported in the same process.
FLAGS: flags.FlagValues = flags.FlagValues()  # type: ignore[no-untyped-call]
_REQUIRED = ("workload", "submission_path", "experiment_dir", "experiment_name")


def _define_flags() -> None:
    def text(name: str, default: str | None, help_: str) -> None:
        flags.DEFINE_string(name, default, help_, flag_values=FLAGS)

    def switch(name: str, default: bool, help_: str) -> None:
        flags.DEFINE_boolean(name, default, help_, flag_values=FLAGS)

    def number(name: str, default: int | None, help_: str, lower: int) -> None:
        flags.DEFINE_integer(name, default, help_, lower_bound=lower, flag_values=FLAGS)

    def choice(name: str, default: str | None, values: list[str], help_: str) -> None:
        flags.DEFINE_enum(name, default, values, help_, flag_values=FLAGS)

    choice("workload", None, list(WORKLOADS), "What to train: molecules (a GraphNetwork) or images "
           "(a ViT).")  # fmt: skip
    choice("framework", "pytorch", ["pytorch"], "Kept for AlgoPerf's command lines.")
    choice("tuning_ruleset", "external", ["external"], "Kept for AlgoPerf's command lines.")
    text("submission_path", None, "Python file with the submission's functions.")
    text("tuning_search_space", None, "JSON file with hyperparameter points or a space.")
    number("num_tuning_trials", 1, "Number of points to train, one after the other.", 1)
    number("hparam_start_index", None, "First point to train, counted from 0.", 0)
    number("hparam_end_index", None, "Point before which to stop, counted from 0.", 0)
    text("data_dir", None, "Data folder. molecules: what quickstart.molecules prepared (default: "
         "data/ of this project). images: CIFAR-10 (default: scikit-learn's digits).")  # fmt: skip
    text("experiment_dir", None, "Folder for all experiments.")
    text("experiment_name", None, "Folder below it for this run; may contain slashes.")
    number("max_global_steps", None, "Number of steps (default: the workload's).", 1)
    number("rng_seed", None, "Seed, 0 or more (default: drawn from the machine).", 0)
    number("batch_size", None, "Examples per batch (default: the submission's get_batch_size, or "
           "the workload's where the submission does not know it).", 1)  # fmt: skip
    number("eval_every", None, "Steps between evaluations (default: the workload's, 25).", 1)
    number(
        "eval_every_early", None, "The same for the first 100 steps (default: no difference).", 1
    )
    for split in ("validation", "test"):
        flags.DEFINE_float(f"{split}_target_value", None, f"Value to reach on the {split} set "
                           "(default: the workload's).", flag_values=FLAGS)  # fmt: skip
    switch("stop_at_target", True, "End training once both targets are met, as in AlgoPerf.")
    switch("save_checkpoints", True, "Save a checkpoint at each evaluation.")
    switch("resume_last_run", False, "Go on with the run that the folder holds.")
    switch("overwrite", False, "Delete the run that the folder holds.")
    switch("use_wandb", False, "Also log to Weights & Biases (WANDB_MODE=offline works).")
    text("progress_file", None, "JSON file to keep up to date with step, loss and metric.")
    switch("help", False, "Show this help.")


_define_flags()


def parse_flags(arguments: list[str]) -> flags.FlagValues:
    """Reads the command line.

    Raises:
        QuickstartError: naming the flag and what is allowed.
    """
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()
    try:
        rest = FLAGS([sys.argv[0], *arguments], known_only=False)[1:]
    except flags.Error as error:
        message = " ".join(str(error).split())
        named = re.search(r"flag --(?:no)?(\w+)", message)
        if named and named[1] in FLAGS:
            message += f" ({FLAGS[named[1]].help})"
        raise QuickstartError(f"{message}; --help lists all flags") from error
    if FLAGS.help:
        return FLAGS
    if rest:
        raise QuickstartError(f"what is {rest[0]!r}? Flags are written --name=value; see --help")
    missing = [f"--{name}" for name in _REQUIRED if not FLAGS[name].value]
    if missing:
        raise QuickstartError(f"{', '.join(missing)} must be given; --help lists all flags")
    if FLAGS.resume_last_run and FLAGS.overwrite:
        raise QuickstartError("--resume_last_run and --overwrite exclude each other")
    if FLAGS.use_wandb:
        _require_wandb()
    return FLAGS


def main(arguments: list[str] | None = None) -> int:
    """Runs the trials that the command line asks for."""
    options = parse_flags(sys.argv[1:] if arguments is None else arguments)
    if options.help:
        print(f"{__doc__}\n{FLAGS.main_module_help() or FLAGS.get_help()}")
        return 0
    logging.basicConfig(format="%(message)s")
    keep_freed_memory()
    submission = submissions.load(Path(options.submission_path))
    seed = options.rng_seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    points = _read_points(options, seed)
    data_dir = None if options.data_dir is None else Path(options.data_dir).expanduser()
    workload = build_workload(options.workload, data_dir)
    workload.set_targets(options.validation_target_value, options.test_target_value)
    folder = run_logs.workload_folder(
        Path(options.experiment_dir).expanduser(), options.experiment_name, options.workload
    )
    settings = RunSettings(
        rng_seed=seed,
        batch_size=choose_batch_size(options.batch_size, options.workload, submission, workload),
        max_global_steps=options.max_global_steps or workload.step_hint,
        eval_every=options.eval_every or workload.eval_period_steps,
        eval_every_early=options.eval_every_early,
        save_checkpoints=options.save_checkpoints,
        stop_at_target=options.stop_at_target,
    )
    run_logs.open_workload_folder(folder, options.resume_last_run, options.overwrite)
    signal.signal(signal.SIGTERM, _terminate)
    for index, point in points:
        trial = folder / f"trial_{index + 1}"
        try:
            with _exclusive(trial):
                _run_trial(options, workload, submission, point, settings, trial)
        except InterruptedRunError as interruption:
            return _explain_interruption(interruption, trial)
    return 0


def _run_trial(
    options: flags.FlagValues,
    workload: QuickstartWorkload,
    submission: submissions.Submission,
    hyperparameters: Any,
    settings: RunSettings,
    trial: Path,
) -> None:
    identity = run_identity(workload, submission, hyperparameters, settings)
    record = read_record(trial)
    if record.get("stop_reason") is not None:
        print(f"{trial} is complete (it ended by: {record['stop_reason']}); nothing to do")
        return
    changed = [key for key in identity if record and record.get(key) != identity[key]]
    if "code_version" in changed:
        print(f"note: the code has changed since {trial} was begun", file=sys.stderr)
        changed.remove("code_version")
    if changed:
        raise QuickstartError(
            f"{trial} was begun with another {', '.join(changed)}: give the same settings to go "
            "on with it, or --overwrite to begin anew"
        )
    with contextlib.ExitStack() as cleanup:
        logger = run_logs.MetricsLogger(trial, options.use_wandb)
        run = TrainingRun(workload, submission, hyperparameters, settings, trial, logger)
        for problem in run.restore():
            print(f"note: {problem}; using the one before", file=sys.stderr)
        if run.global_step:
            print(f"going on from step {run.global_step}", file=sys.stderr)
        count = run.preemption_count
        point = hyperparameters._asdict() if hyperparameters is not None else {}
        run_logs.write_json(trial / "hparams.json", point)
        meta = run_logs.meta_data(workload, settings.rng_seed, settings.batch_size)
        run_logs.write_json(trial / f"meta_data_{count}.json", meta)
        given = {**options.flag_values_dict(), "max_global_steps": settings.max_global_steps}
        run_logs.write_json(trial / f"flags_{count}.json", given)
        run_logs.write_json(trial / run_logs.RUN_RECORD, identity)
        if options.use_wandb:
            _start_wandb(options, hyperparameters, trial)
        progress_file = None if options.progress_file is None else Path(options.progress_file)
        reporter = choose_reporter(
            options.experiment_name,
            settings.max_global_steps,
            workload.target_metric_name,
            progress_file,
        )
        cleanup.callback(reporter.close)
        reason = run.train(reporter)
    ended = {"stop_reason": reason, "global_step": run.global_step}
    run_logs.write_json(trial / run_logs.RUN_RECORD, {**identity, **ended})


def run_identity(
    workload: QuickstartWorkload,
    submission: submissions.Submission,
    hyperparameters: Any,
    settings: RunSettings,
) -> dict[str, Any]:
    """What has to be equal for two runs to give the same result (on the same machine)."""
    return {
        "hyperparameters": hyperparameters._asdict() if hyperparameters is not None else {},
        "settings": asdict(settings),
        "targets": [workload.validation_target_value, workload.test_target_value],
        "data": workload.data_checksum,
        "code_version": run_logs.code_version(submission.path),
    }


def read_record(trial: Path) -> dict[str, Any]:
    """The record of a trial that was begun, empty if there is none."""
    try:
        record: dict[str, Any] = json.loads((trial / run_logs.RUN_RECORD).read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}")
    except FileNotFoundError:
        if list_checkpoints(trial):
            raise QuickstartError(
                f"{trial} has checkpoints, but {run_logs.RUN_RECORD}, which says what run they "
                "belong to, is gone: begin anew with --overwrite"
            ) from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise QuickstartError(
            f"{trial / run_logs.RUN_RECORD} is damaged ({error}): begin anew with --overwrite"
        ) from error
    return record


def _read_points(options: flags.FlagValues, seed: int) -> list[tuple[int, Any]]:
    if options.tuning_search_space is None:
        raise QuickstartError("--tuning_search_space must be given: a JSON file of hyperparameters")
    path = Path(options.tuning_search_space)
    points = search_space.read_points(path, options.num_tuning_trials, seed)
    chosen = list(enumerate(points))[options.hparam_start_index : options.hparam_end_index]
    if not chosen:
        raise QuickstartError(
            f"--hparam_start_index and --hparam_end_index leave none of the {len(points)} points"
        )
    return chosen


def choose_batch_size(
    given: int | None,
    workload_name: str,
    submission: submissions.Submission,
    workload: QuickstartWorkload,
) -> int:
    """The batch size given by the user, else the submission's, else the workload's."""
    if given is not None:
        return given
    try:
        return int(submission.get_batch_size(workload_name))
    except ValueError:
        return workload.default_batch_size


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt


def _explain_interruption(interruption: InterruptedRunError, trial: Path) -> int:
    saved = list_checkpoints(trial)
    if saved:
        step = saved[0].name.removeprefix("checkpoint_")
        advice = f"add --resume_last_run to go on from step {step}"
    else:
        advice = "nothing was saved yet, --resume_last_run begins anew"
    print(f"interrupted at step {interruption.step}: {advice}", file=sys.stderr)
    return 130


@contextlib.contextmanager
def _exclusive(trial: Path) -> Iterator[None]:
    """Keeps a second process out of a trial's folder."""
    try:
        with locks.hold(trial):
            yield
    except locks.RunInUseError as error:
        raise QuickstartError(str(error)) from error
    except OSError as error:
        raise explain_os_error(error, Path(error.filename or trial)) from error


def _require_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise QuickstartError(
            "--use_wandb: wandb is not installed; ./run.sh setup --wandb installs it"
        )


def _start_wandb(options: flags.FlagValues, hyperparameters: Any, trial: Path) -> None:
    """Starts a wandb run that has all that the comparer reads from the trial's folder."""
    live = importlib.import_module("steps_to_target.wandb_runs.live")
    wandb = importlib.import_module("wandb")
    tags = [options.workload, "pytorch", "quickstart"]
    wandb.init(dir=str(trial), tags=tags, **live.arguments(trial))
    wandb.config.update(options.flag_values_dict(), allow_val_change=True)
    if hyperparameters is not None:
        wandb.config.update(hyperparameters._asdict(), allow_val_change=True)
    wandb.config.update(live.description(trial), allow_val_change=True)


if __name__ == "__main__":
    run_reporting_errors(main)
