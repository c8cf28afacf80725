"""Starts AlgoPerf's own submission_runner with research settings.

    python -m workloads_overrides.launch [options] [--] FLAGS OF THE SUBMISSION RUNNER

The runner itself, the workloads and the submission stay as they are: properties of the workload,
the batch size and, where there is no GPU, assumptions about CUDA are replaced in memory. Under
torchrun every process does the same; on a CPU they talk over gloo.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workloads_overrides import (
    cpu,
    installation,
    outcome,
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
  torchrun --standalone --nproc_per_node=4 -m workloads_overrides.launch --paper-budget -- \\
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
    """

    workload: str
    overrides: dict[str, Value]
    sources: dict[str, str]
    batch_size: int | None
    flags: RunnerFlags
    on_cpu: bool
    world_size: int

    def describe(self) -> str:
        """The effective settings and the runner's command, to be read by a person."""
        device = "CPU (CUDA stood in for)" if self.on_cpu else "GPU"
        lines = [
            f"workload    {self.workload}",
            f"processes   {self.world_size} on {device}",
            f"batch size  {self.batch_size or 'as the submission says'}",
        ]
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
        prog="python -m workloads_overrides.launch",
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
        on_cpu=not torch.cuda.is_available(),
        world_size=_world_size(),
    )


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or not 1 <= len(text) <= 6 or int(text) < 1:
        raise LaunchError(f"WORLD_SIZE={text[:20]} is no number of processes (torchrun sets it)")
    return int(text)


def run(plan: Plan) -> None:
    """Imports AlgoPerf, registers the overrides, hands over to its runner, checks the outcome.

    Raises:
        LaunchError: AlgoPerf or the workload cannot be imported, an override does not fit the
            workload, data is missing, a run to go on with has other hyperparameters, or the run
            ended without a single evaluation.
    """
    installation.require_algoperf()
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
    if trials is not None and plan.flags.is_on("resume_last_run") and _is_first_process():
        for note in saved.set_damaged_aside(trials):
            print(f"note: {note}", file=sys.stderr)
    search.register_search(halton, trials, Path(str(plan.flags.value("submission_path"))))
    registration.register_properties(registry, plan.overrides)
    if plan.batch_size is not None:
        registration.register_batch_size(runner, registry, plan.batch_size)

    def run_and_check(argv: list[str]) -> None:
        runner.main(argv)
        if _is_first_process() and trials is not None and not plan.flags.is_on("skip_evals"):
            outcome.require_evaluations(trials)

    app.run(run_and_check, argv=["submission_runner", *plan.flags.argv])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options, runner_argv = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        plan = make_plan(options, runner_argv)
        if _is_first_process():
            print(plan.describe(), flush=True)
        if not options.dry_run:
            run(plan)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
