"""Starts AlgoPerf's own submission_runner with research settings.

    python -m workloads_overrides.launch [options] [--] FLAGS OF THE SUBMISSION RUNNER

The runner itself, the workloads and the submission stay as they are: properties of the workload,
the batch size and, where there is no GPU, assumptions about CUDA are replaced in memory. With
NPROC above 1 torchrun starts that many processes, which all do the same; on a CPU they talk over
gloo.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads_overrides import (
    installation,
    outcome,
    processes,
    records,
    registration,
    runner_flags,
    saved,
    search,
)
from workloads_overrides.budgets import paper_budget
from workloads_overrides.data_folders import require_data
from workloads_overrides.errors import LaunchError
from workloads_overrides.miniature.manifest import read_properties
from workloads_overrides.properties import Value, override_properties, parse_settings
from workloads_overrides.runner_flags import RunnerFlags

EXAMPLE = """example:
  NPROC=4 ./run.sh algoperf --paper-budget -- \\
      --workload=ogbg --data_dir=DATA/ogbg --experiment_name=kfac_reduce \\
      --tuning_search_space=workloads_overrides/paper/ogbg/kfac_reduce.json

flags of the submission runner that are filled in unless given:
  --framework=pytorch  --submission_path=submission/submission.py  --experiment_dir=runs
  --tuning_search_space=tuning_search_space.json
  --resume_last_run, unless there is --overwrite: an existing run goes on, without a question
  --imagenet_v2_data_dir, for the ImageNet workloads, if it is in --data_dir or beside it
"""


@dataclass(frozen=True)
class Plan:
    """Everything that a launch will do, worked out before anything heavy is imported.

    Attributes:
        workload: AlgoPerf's name of the workload.
        overrides: Workload properties to replace.
        sources: Where each override comes from, by property.
        batch_size: Global batch size in place of the submission's, None to leave it.
        flags: The complete flags of the runner.
        on_cpu: Whether CUDA is to be stood in for.
        world_size: Number of processes.
        mask: CUDA_VISIBLE_DEVICES to set, None to leave it.
    """

    workload: str
    overrides: dict[str, Value]
    sources: dict[str, str]
    batch_size: int | None
    flags: RunnerFlags
    on_cpu: bool
    world_size: int
    mask: str | None = None

    def describe(self) -> str:
        """The effective settings and the runner's command, to be read by a person."""
        device = "CPU (CUDA stood in for)" if self.on_cpu else "GPU"
        lines = [
            f"workload    {self.workload}",
            f"processes   {self.world_size} on {device}",
            f"batch size  {self.batch_size or 'as the submission says'}",
        ]
        if self.mask is not None:
            lines.append(f"GPUs        {processes.MASK}={self.mask}, one for each process")
        lines += [
            f"property    {name} = {value!r}  ({self.sources[name]})"
            for name, value in self.overrides.items()
        ]
        return "\n".join(
            [*lines, f"runner      {shlex.join(['submission_runner', *self.flags.argv])}"]
        )


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into the launcher's options and the runner's flags.

    With a `--`, only the launcher's own options may come before it; without one, whatever the
    launcher does not know is left to the runner.
    """
    parser = argparse.ArgumentParser(
        prog="./run.sh algoperf",
        usage="%(prog)s [options] [--] FLAGS OF THE SUBMISSION RUNNER",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PROPERTY=VALUE",
        dest="settings",
        help="replace a property of the workload, such as step_hint=80000 (may be repeated)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="global batch size, in place of the submission's get_batch_size",
    )
    parser.add_argument(
        "--paper-budget",
        action="store_true",
        help="step hint, steps, time limit and targets of the paper's runs",
    )
    parser.add_argument(
        "--miniature",
        action="store_true",
        help="the data folder holds data of workloads_overrides.miniature: take its sizes",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the effective settings and the runner's command, and stop",
    )
    arguments = list(argv)
    if "--" not in arguments:
        return parser.parse_known_args(arguments)
    cut = arguments.index("--")
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def make_plan(options: argparse.Namespace, runner_argv: Sequence[str]) -> Plan:
    """Works out a launch. Where settings overlap, --set beats --miniature beats --paper-budget.

    Raises:
        LaunchError: The options or the runner's flags cannot work.
    """
    if options.batch_size is not None and options.batch_size < 1:
        raise LaunchError(f"--batch-size {options.batch_size}: must be at least 1")
    flags = runner_flags.complete(runner_argv, Path.cwd())
    workload = str(flags.value("workload"))
    layers: list[tuple[str, dict[str, Value]]] = []
    if options.paper_budget:
        budget = paper_budget(workload)
        layers.append(("paper budget", budget.overrides()))
        flags = flags.with_default("max_global_steps", budget.training_steps)
    if options.miniature:
        data_dir = Path(str(flags.value("data_dir"))).expanduser()
        layers.append(("miniature data", read_properties(data_dir, workload)))
    layers.append(("--set", parse_settings(options.settings)))
    return Plan(
        workload=workload,
        overrides={name: value for _, layer in layers for name, value in layer.items()},
        sources={name: source for source, layer in layers for name in layer},
        batch_size=options.batch_size,
        flags=flags,
        on_cpu=not _has_gpu(),
        **_processes(),
    )


def _has_gpu() -> bool:
    import torch  # not with the others: --help needs no packages

    return torch.cuda.is_available()


def _processes() -> dict[str, Any]:
    """Number of processes and the GPUs that they are to see.

    Raises:
        LaunchError: There are more processes than GPUs, or under torchrun not as many.
    """
    import torch

    visible = torch.cuda.device_count()
    if not processes.under_torchrun():
        count = processes.read_nproc(os.environ)
        return {
            "world_size": count,
            "mask": processes.matching_mask(count, visible, os.environ),
        }
    text = os.environ["WORLD_SIZE"]
    if not text.isdecimal() or not 1 <= len(text) <= 6 or int(text) < 1:
        raise LaunchError(f"WORLD_SIZE={text[:20]} is no number of processes (torchrun sets it)")
    processes.require_match(int(os.environ.get("LOCAL_WORLD_SIZE", text)), visible)
    return {"world_size": int(text)}


def start_processes(plan: Plan, argv: Sequence[str]) -> None:
    """Puts torchrun, or this program with fewer GPUs to see, in the place of this process.

    Does nothing where this process can train as it is.
    """
    module = ["-m", "workloads_overrides.launch", *argv]
    if processes.under_torchrun() or (plan.world_size == 1 and plan.mask is None):
        return
    if plan.world_size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        module = [*torchrun, f"--nproc_per_node={plan.world_size}", *module]
    environment = dict(os.environ)
    if plan.mask is not None:
        environment[processes.MASK] = plan.mask
    os.execve(sys.executable, [sys.executable, *module], environment)


def run(plan: Plan) -> None:
    """Imports AlgoPerf, registers the overrides, hands over to its runner, checks the outcome.

    Raises:
        LaunchError: AlgoPerf or the workload cannot be imported, an override does not fit the
            workload, data is missing, a run to go on with has other hyperparameters, or the run
            ended without a single evaluation.
    """
    installation.require_algoperf()
    from workloads_overrides import cpu

    require_data(plan.workload, plan.flags)
    if plan.on_cpu:
        cpu.apply_all(cpu.torch_replacements(plan.world_size))
    runner = installation.import_runner()
    registry = installation.import_registry()
    override_properties(installation.workload_class(registry, plan.workload), plan.overrides)
    from absl import app
    from algoperf import data_utils, halton

    if plan.on_cpu:
        cpu.apply_all(cpu.algoperf_replacements(data_utils))
    trials = runner_flags.trial_folders(plan.flags)
    search.register_search(halton, trials, Path(str(plan.flags.value("submission_path"))))
    numbers = _trial_numbers(plan, halton)
    package = Path(str(installation.import_package().__file__)).parent
    records.register_records(runner.logger_utils, records.algoperf_commit(package))
    registration.register_properties(registry, plan.overrides)
    if plan.batch_size is not None:
        registration.register_batch_size(runner, registry, plan.batch_size)
    flags = plan.flags

    def run_and_check(argv: list[str]) -> None:
        runner.main(argv)
        if _is_first_process() and trials is not None and not flags.is_on("skip_evals"):
            outcome.require_evaluations(trials)

    with contextlib.ExitStack() as cleanup:
        if trials is not None:
            if flags.is_on("overwrite"):
                # AlgoPerf would delete the folder with the locks in it.
                flags = flags.replaced("overwrite", "false").with_default("resume_last_run")
            elif not trials.exists():
                # The folder is made for its lock, and AlgoPerf would ask what to do with it.
                flags = flags.replaced("resume_last_run", "true")
            if _is_first_process():
                cleanup.enter_context(_only_writer(trials, numbers, plan.flags))
        app.run(run_and_check, argv=["submission_runner", *flags.argv])


def _trial_numbers(plan: Plan, halton: Any) -> list[int]:
    """The trials that this process will train, counted from 1.

    Raises:
        LaunchError: A point that is drawn from the search space is not valid.
    """
    flags = plan.flags
    if flags.value("tuning_ruleset") == "self":
        return [1]
    space = json.loads(Path(str(flags.value("tuning_search_space"))).read_text(encoding="utf-8"))
    points = halton.generate_search(space, int(flags.value("num_tuning_trials") or 1))
    bounds = (flags.value(name) for name in ("hparam_start_index", "hparam_end_index"))
    first, last = (None if bound is None else int(bound) for bound in bounds)
    return list(range(1, len(points) + 1))[first:last]


@contextlib.contextmanager
def _only_writer(trials: Path, numbers: Sequence[int], flags: RunnerFlags) -> Iterator[None]:
    """Keeps other processes out of the trials' folders, which are deleted first for --overwrite.

    Raises:
        LaunchError: Another process trains in one of them, or files of a run to go on with are
            damaged beyond use.
    """
    from quickstart import locks

    with contextlib.ExitStack() as held:
        try:
            if flags.is_on("overwrite") and trials.exists():
                locks.delete(trials)
            for number in numbers:
                held.enter_context(locks.hold(trials / f"trial_{number}"))
        except locks.RunInUseError as error:
            raise LaunchError(str(error)) from error
        except OSError as error:
            raise LaunchError(f"cannot write into {trials}: {error.strerror or error}") from error
        for note in saved.set_damaged_aside(trials):
            print(f"note: {note}", file=sys.stderr)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    options, runner_argv = parse_options(given)
    try:
        plan = make_plan(options, runner_argv)
        if _is_first_process():
            print(plan.describe(), flush=True)
        if not options.dry_run:
            start_processes(plan, given)
            run(plan)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def command() -> None:
    """Entry point: runs the command line and leaves with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    command()
