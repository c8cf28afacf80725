"""Seconds a step and peak memory beside AlgoPerf's own NAdamW, on every workload's fake batches.

    .venv-algoperf/bin/python -m workloads_overrides.step_costs --clone=.cache/algoperf ogbg cifar

Each method runs AlgoPerf's own test of a submission (see `fake_queue`) in a process of its own,
with batches of a few examples: work on the parameters alone, such as applying expand's inverses,
counts for more there than in training. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = (
    "mnist", "cifar", "criteo1tb_test", "fastmri", "imagenet_resnet", "imagenet_vit",
    "librispeech_conformer", "librispeech_deepspeech", "ogbg", "wmt",
)  # fmt: skip
REFERENCE = "algorithms/archived_paper_baselines/nadamw/pytorch/submission.py"
_COMMON = {"learning_rate": 3e-4, "beta2": 0.99, "weight_decay": 0.01, "dropout_rate": 0.0}
INTERVAL = 10  # steps from update to update; more than are run
_KFAC = {
    **_COMMON, "update_rule": "nadamw", "warmup_fraction": 0.0, "damping": 1e-3,
    "damping_kind": "pi", "factor_update_steps": INTERVAL, "inverse_update_steps": INTERVAL,
    "early_updates": False,
}  # fmt: skip
POINTS: Mapping[str, Mapping[str, Any]] = {
    "NAdamW": {**_COMMON, "one_minus_beta1": 0.1, "warmup_factor": 0.05, "label_smoothing": 0.0},
    "reduce": {**_KFAC, "kfac_approx": "reduce"},
    "expand": {**_KFAC, "kfac_approx": "expand"},
}
_WITH_UPDATES = ("reduce", "expand")


def measure(
    clone: Path, workload: str, method: str, batch_size: int, steps: int, folder: Path
) -> dict[str, Any]:
    """The outcome of `fake_queue` for one method; it is written to the folder, too.

    Raises:
        RuntimeError: the test could not be run, or failed.
    """
    submission: Path | str = "submission/submission.py"
    if method == "NAdamW":
        # The test imports a submission by its path from where it runs: a copy.
        submission = Path(f"reference_{workload}.py")
        (folder / submission).write_bytes((clone / REFERENCE).read_bytes())
    point, out = folder / "point.json", folder / f"{workload}, {method}.json"
    point.write_text(json.dumps([POINTS[method]]), encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "workloads_overrides.fake_queue", f"--clone={clone}",
            f"--out={out}", f"--workload={workload}", f"--submission_path={submission}",
            f"--tuning_search_space={point}", f"--global_batch_size={batch_size}",
            f"--num_train_steps={steps}", "--short_decoding",
        ],
        cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    outcome: dict[str, Any] = {}
    if out.exists():
        outcome = json.loads(out.read_text(encoding="utf-8"))
    if not outcome.get("passed"):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(outcome.get("error") or last)
    return outcome


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@dataclass(frozen=True)
class Costs:
    """What one method costs on one workload.

    Attributes:
        update: seconds of the first step, the one with an update.
        other: median seconds of the steps after the second, which still warms up.
        memory: peak MiB of the process.
    """

    update: float
    other: float
    memory: float

    @classmethod
    def of(cls, outcome: Mapping[str, Any]) -> Costs:
        """From the outcome of `fake_queue`."""
        first, _, *others = outcome["step_seconds"]
        return cls(first, statistics.median(others), outcome["memory_peak"])


def heading() -> str:
    """The first two lines of the table."""
    groups = [
        ("s a step", POINTS), ("s with an update", _WITH_UPDATES), ("peak MiB", POINTS),
    ]  # fmt: skip
    cells = [f"{what}: {method}" for what, methods in groups for method in methods]
    return f"| workload | {' | '.join(cells)} |\n|---|{'---:|' * len(cells)}"


def line(workload: str, found: Mapping[str, Costs]) -> str:
    """A workload's line; `-` for methods that could not be run."""
    cells = [f"{found[m].other:.2f}" if m in found else "-" for m in POINTS]
    cells += [f"{found[m].update:.2f}" if m in found else "-" for m in _WITH_UPDATES]
    cells += [f"{found[m].memory:,.0f}" if m in found else "-" for m in POINTS]
    return f"| {workload} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each workload; returns 1 if one could not be run."""
    parser = argparse.ArgumentParser(prog="workloads_overrides.step_costs", allow_abbrev=False)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--clone", required=True, type=Path, help="folder of AlgoPerf's repository")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="3 to 10 (default: 6)")
    parser.add_argument("--out", type=Path, help="also keep all figures in this JSON file")
    options = parser.parse_args(argv)
    clone = options.clone.resolve()
    if not (clone / REFERENCE).exists():
        parser.error(
            f"--clone: there is no {clone / REFERENCE}; ./run.sh setup --algoperf brings "
            "AlgoPerf's repository to .cache/algoperf"
        )
    if not 3 <= options.steps <= INTERVAL:
        parser.error(f"--steps must be 3 to {INTERVAL}, not {options.steps}")
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"no workload '{min(unknown)}'; there are {', '.join(WORKLOADS)}")
    everything: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    print(heading(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "submission").symlink_to(ROOT / "submission")
        for workload in options.workloads or WORKLOADS:
            found: dict[str, Costs] = {}
            for method in POINTS:
                try:
                    outcome = measure(
                        clone, workload, method, options.batch_size, options.steps, Path(folder)
                    )
                except RuntimeError as error:
                    failures.append(f"{workload}, {method}: {error}")
                else:
                    found[method] = Costs.of(outcome)
            print(line(workload, found), flush=True)
            everything[workload] = {method: asdict(costs) for method, costs in found.items()}
    if options.out is not None:
        options.out.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    for failure in failures:
        print(f"could not be run: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
