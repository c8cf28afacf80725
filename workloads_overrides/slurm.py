"""Sends the trials of a study to a Slurm cluster, one job of an array for each, through submitit.

    ./run.sh slurm [options] -- ARGUMENTS OF ./run.sh algoperf

Each trial is a process of its own (NPROC processes, one per GPU) and goes on from its last
checkpoint when its job is preempted or runs out of time: the job is queued again.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads_overrides.errors import LaunchError
from workloads_overrides.points import require_valid_points
from workloads_overrides.runner_flags import DEFAULTS, RunnerFlags
from workloads_overrides.slurm_trial import Trial

ROOT = Path(__file__).resolve().parents[1]
SIGNAL_SECONDS = 120  # between Slurm's warning and the kill
RESTARTS = 100  # after time limits; preemptions are not counted
REFUSED = {
    "overwrite": "a trial that is queued again would delete what it has done: give a new "
    "--experiment_name, or delete the old run's folder",
    "append_timestamp": "a trial that is queued again would begin anew in a new folder",
}
EXAMPLE = """example:
  NPROC=4 ./run.sh slurm --studies 3 --partition gpu --time 24:00:00 -- --paper-budget -- \\
      --workload=ogbg --data_dir=DATA/ogbg --experiment_dir=runs --experiment_name=search_reduce \\
      --tuning_search_space=workloads_overrides/paper/ogbg/search_reduce.json --num_tuning_trials=5

NPROC is the number of processes and GPUs of a trial. The whole environment goes into the jobs,
WANDB_* included, and into no file. The project's folder, its environments, the data and the runs
have to be on disks that the cluster's nodes see.
"""


class SlurmError(LaunchError):
    """Trials that cannot be sent; the message says what to do about it."""


@dataclass(frozen=True)
class Study:
    """What is to be sent.

    Attributes:
        trials: One job each.
        folder: Where submitit keeps its job files and the jobs' output.
        parameters: Of submitit's AutoExecutor.
    """

    trials: list[Trial]
    folder: Path
    parameters: dict[str, Any]

    def describe(self) -> str:
        """The exact commands and the jobs' parameters."""
        wandb = sorted(name for name in os.environ if name.startswith("WANDB_"))
        lines = [
            f"jobs         {len(self.trials)} in one array",
            f"job files    {self.folder}",
            f"environment  all of it, with {', '.join(wandb) or 'no WANDB_*'}",
            *(f"submitit     {key}={value}" for key, value in self.parameters.items()),
            *(f"{trial.name}  {trial.describe()}" for trial in self.trials),
        ]
        return "\n".join(lines)


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line at the first `--` into options and the runner's arguments.

    Raises:
        SlurmError: There is no `--`.
    """
    parser = argparse.ArgumentParser(
        prog="./run.sh slurm",
        usage="%(prog)s [options] -- ARGUMENTS OF ./run.sh algoperf",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--runner", choices=list(RUNNERS), default="algoperf", help="what runs a trial: algoperf, "
        "or quickstart (arguments: flags of quickstart.runner)")  # fmt: skip
    add("--studies", type=_positive, metavar="N", help="repeat all trials with N seeds, as "
        "EXPERIMENT_NAME/study_0, study_1, ... (default: once, without such a folder)")  # fmt: skip
    add("--time", type=_minutes, default="24:00:00", metavar="[D-]HH:MM:SS",
        help="of a job; the trial goes on in the next one (default: 24:00:00)")  # fmt: skip
    add("--cpus", type=_positive, default=4, metavar="N", help="CPU cores per process (default: 4)")
    add("--gpus", type=_count, metavar="N", help="GPUs per trial (default: NPROC, quickstart: 0)")
    add("--mem", type=_positive, metavar="GB", help="main memory per trial")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", help=f"Slurm's {name}")
    add("--sbatch", action="append", type=_pair, default=[], metavar="KEY=VALUE",
        help="any other option of sbatch, such as gres=gpu:v100:4 (repeatable)")  # fmt: skip
    add("--at-once", type=_positive, metavar="N", help="trials that run at a time (default: all)")
    add("--folder", type=Path, help="job files and output (default: slurm_jobs/EXPERIMENT_NAME in "
        "the --experiment_dir)")  # fmt: skip
    add("--local", action="store_true", help="run the trials here, all at once, without Slurm")
    add("--wait", action="store_true", help="wait for the trials; exit code 1 if one failed")
    add("--dry-run", action="store_true", help="print the exact commands, and stop")
    arguments = list(argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    if not arguments[cut + 1 :]:
        raise SlurmError(
            "what is to run? Put the arguments of ./run.sh algoperf behind a `--`: "
            "./run.sh slurm --partition gpu -- --workload=ogbg ..."
        )
    return options, arguments[cut + 1 :]


def make_study(
    options: argparse.Namespace, argv: Sequence[str], environment: Mapping[str, str]
) -> Study:
    """Works out the trials, after checking everything that can be checked before they queue.

    Raises:
        LaunchError: The arguments cannot work.
    """
    processes = _processes(environment)
    runner = RUNNERS[options.runner]
    flags = runner.check(argv)
    for name, reason in REFUSED.items():
        if flags.is_on(name):
            raise SlurmError(f"--{name}: {reason}")
    numbers = _trial_numbers(flags)
    seed = _integer(flags, "rng_seed", 1)
    if seed < 1:
        raise SlurmError(
            f"--rng_seed={seed}: give 1 or more (AlgoPerf draws its own in place of 0)"
        )
    name = str(flags.value("experiment_name"))
    trials = []
    for study in range(options.studies or 1):
        label = f"study_{study}/" if options.studies else ""
        for number in numbers:
            given = [
                *(["--resume_last_run"] if options.runner == "quickstart" else []),
                *([f"--experiment_name={name}/study_{study}"] if options.studies else []),
                f"--rng_seed={seed + study}",
            ]
            if not _is_self_tuning(flags):
                given += [f"--hparam_start_index={number}", f"--hparam_end_index={number + 1}"]
            command = (*runner.command, *argv, *given)
            trials.append(Trial(f"{label}trial_{number + 1}", command, processes, str(ROOT)))
    root = Path(flags.value("experiment_dir") or DEFAULTS["experiment_dir"]).expanduser()
    folder = (options.folder or root / "slurm_jobs" / name).absolute()
    if "%" in str(folder):
        raise SlurmError(f"{folder}: Slurm reads a % as a placeholder; give another --folder")
    gpus = options.gpus
    if gpus is None:
        gpus = processes if options.runner == "algoperf" else 0
    return Study(trials, folder, job_parameters(options, name, processes, gpus))


def job_parameters(
    options: argparse.Namespace, name: str, processes: int, gpus: int
) -> dict[str, Any]:
    """What submitit is told about a job, out of the options of the command line."""
    parameters = {
        "name": re.sub(r"[^\w.-]", "_", name),
        "nodes": 1,
        "tasks_per_node": 1,
        "timeout_min": options.time,
        "cpus_per_task": options.cpus * processes,
        "gpus_per_node": gpus or None,
        "mem_gb": options.mem,
        "stderr_to_stdout": True,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "slurm_constraint": options.constraint,
        "slurm_array_parallelism": options.at_once,
        "slurm_signal_delay_s": SIGNAL_SECONDS,
        "slurm_additional_parameters": {"requeue": True, "export": "ALL", **dict(options.sbatch)},
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
    }
    return {key: value for key, value in parameters.items() if value is not None}


# ---- what runs a trial ------------------------------------------------------------------------


def _check_algoperf(argv: Sequence[str]) -> RunnerFlags:
    from workloads_overrides import launch

    options, runner_argv = launch.parse_options(argv)
    return launch.make_plan(options, runner_argv).flags


def _check_quickstart(argv: Sequence[str]) -> RunnerFlags:
    from quickstart import runner, search_space
    from quickstart.errors import QuickstartError

    try:
        options = runner.parse_flags(list(argv))
        if options.tuning_search_space is None:
            raise QuickstartError("--tuning_search_space must be given")
        path = Path(options.tuning_search_space)
        points = search_space.read_points(path, options.num_tuning_trials, 1)
        submission = Path(options.submission_path)
        given = [point._asdict() for point in points]
        require_valid_points(given, submission, f"--tuning_search_space={path}")
    except (QuickstartError, LaunchError) as error:
        raise SlurmError(str(error)) from error
    return RunnerFlags(tuple(argv))


@dataclass(frozen=True)
class Runner:
    """What a trial starts, and how its arguments are checked and read beforehand."""

    command: tuple[str, ...]
    check: Callable[[Sequence[str]], RunnerFlags]


RUNNERS = {
    "algoperf": Runner((str(ROOT / "run.sh"), "algoperf"), _check_algoperf),
    "quickstart": Runner((sys.executable, "-m", "quickstart.runner"), _check_quickstart),
}


def _is_self_tuning(flags: RunnerFlags) -> bool:
    return flags.value("tuning_ruleset") == "self"


def _trial_numbers(flags: RunnerFlags) -> range:
    if _is_self_tuning(flags):
        return range(1)  # AlgoPerf calls it trial_1
    count = _integer(flags, "num_tuning_trials", 1)
    path = Path(str(flags.value("tuning_search_space")))
    space = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(space, list) and count > len(space):
        raise SlurmError(f"--num_tuning_trials={count}: {path} has {len(space)} points")
    first = _integer(flags, "hparam_start_index", 0)
    last = _integer(flags, "hparam_end_index", count)
    if not 0 <= first < last <= count:
        raise SlurmError(
            f"--hparam_start_index={first} and --hparam_end_index={last} leave no trial, or go "
            f"beyond the {count} of --num_tuning_trials"
        )
    return range(first, last)


def _integer(flags: RunnerFlags, name: str, default: int) -> int:
    text = flags.value(name)
    try:
        return default if text is None else int(text)
    except ValueError:
        raise SlurmError(f"--{name}={text}: must be a whole number") from None


# ---- sending --------------------------------------------------------------------------------


def submit(study: Study, *, local: bool) -> list[Any]:
    """Sends the trials; returns submitit's jobs, in the order of the trials.

    Raises:
        SlurmError: submitit or Slurm is missing or refuses, or the same trials are queued already.
    """
    try:
        import submitit
    except ImportError:
        raise SlurmError(
            "submitit is not installed: ./run.sh slurm installs it, or run "
            "`pip install -r requirements/slurm.txt`"
        ) from None
    record = study.folder / "jobs.json"
    if not local:
        _require_not_queued(record)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the jobs unpickle trials of this package
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(
            study.folder, cluster="local" if local else "slurm", slurm_max_num_timeout=RESTARTS
        )
        executor.update_parameters(**study.parameters)
        with executor.batch():
            jobs = [executor.submit(trial) for trial in study.trials]
    except OSError as error:
        raise SlurmError(f"cannot write into {study.folder}: {error.strerror}") from error
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SlurmError(f"Slurm refused the jobs: {' '.join(str(error).split())}") from error
    except RuntimeError as error:  # of submitit: no srun here
        raise SlurmError(
            f"{error} Run this where sbatch and srun are, or with --local on this machine"
        ) from error
    numbers = {trial.name: job.job_id for trial, job in zip(study.trials, jobs, strict=True)}
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, record)
    return jobs


def _require_not_queued(record: Path) -> None:
    """Two jobs in one trial's folder would overwrite each other's checkpoints."""
    try:
        numbers = sorted(set(json.loads(record.read_text(encoding="utf-8")).values()))
    except (OSError, ValueError):
        return
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(numbers)}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return  # submitit tells what is missing; jobs long forgotten are an error of squeue's
    queued = " ".join(found.stdout.split())
    if queued:
        raise SlurmError(
            f"jobs of these trials are queued or running ({queued}): wait for them, or "
            "cancel them with scancel"
        )


def wait(study: Study, jobs: Sequence[Any]) -> int:
    """Waits for all jobs; returns how many failed, having named them."""
    failed = 0
    for trial, job in zip(study.trials, jobs, strict=True):
        if job.exception() is None:
            print(f"{trial.name}: done", flush=True)
        else:
            failed += 1
            print(f"{trial.name}: failed, see {job.paths.stdout}", file=sys.stderr, flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        options, runner_argv = parse_options(sys.argv[1:] if argv is None else argv)
        study = make_study(options, runner_argv, os.environ)
        if options.dry_run:
            print(study.describe())
            return 0
        jobs = submit(study, local=options.local)
        for trial, job in zip(study.trials, jobs, strict=True):
            print(f"{trial.name}: job {job.job_id}, output {job.paths.stdout}", flush=True)
        failed = wait(study, jobs) if options.wait or options.local else 0
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; jobs that were sent go on (scancel ends them)", file=sys.stderr)
        return 130
    if failed:
        print(f"error: {failed} of {len(jobs)} trials failed", file=sys.stderr)
    return 1 if failed else 0


# ---- values of options ------------------------------------------------------------------------


def _processes(environment: Mapping[str, str]) -> int:
    text = environment.get("NPROC", "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise SlurmError(f"NPROC={text[:20]} is no number of processes: give 1 to 9999")
    return int(text)


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _minutes(text: str) -> int:
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    minutes = 0
    if found is not None:
        days, hours, rest, seconds = (int(part or 0) for part in found.groups())
        minutes = (days * 24 + hours) * 60 + rest + (seconds > 0)
    if minutes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give HH:MM:SS or D-HH:MM:SS")
    return minutes


def _pair(text: str) -> tuple[str, str | bool]:
    key, equals, value = text.lstrip("-").partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*", key) or "\n" in value:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value if equals else True


def command() -> None:
    """Entry point: runs the command line and leaves with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    command()
