"""Seconds a step and peak memory beside AlgoPerf's own NAdamW, on every workload's fake batches.

    .venv-algoperf/bin/python -m workloads_overrides.step_costs --clone=.cache/algoperf ogbg cifar

Each figure comes from AlgoPerf's own test of a submission (see `fake_queue`) in a process of its
own, on this machine, with batches of a few examples: with so few, K-FAC's work on the parameters
counts for more, and its low-rank factors for less, than in training. Nothing else should run.
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
    "K-FAC-reduce": {**_KFAC, "kfac_approx": "reduce"},
    "K-FAC-expand": {**_KFAC, "kfac_approx": "expand"},
}


def measure(
    clone: Path, workload: str, method: str, batch_size: int, steps: int, folder: Path
) -> dict[str, Any]:
    """The outcome of `fake_queue` for one method; it is written to the folder, too.

    Raises:
        RuntimeError: the test could not be run, or failed.
    """
    submission: Path | str = "submission/submission.py"
    if method == "NAdamW":
        # The test imports a submission by its path from where it runs: a copy, which is removed.
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


def row(outcome: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the step with an update, median seconds of the others, peak MiB.

    The first step is the one with an update; the second still warms up.
    """
    first, _, *others = outcome["step_seconds"]
    return {
        "s, step with update": first,
        "s, other steps": statistics.median(others),
        "peak MiB": outcome["memory_peak"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each workload and method; returns 1 if one could not be run."""
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
    found: dict[str, dict[str, dict[str, float]]] = {}
    failed = False
    print("| workload | method | s, step with update | s, other steps | peak MiB |")
    print("|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "submission").symlink_to(ROOT / "submission")
        for workload in options.workloads or WORKLOADS:
            for method in POINTS:
                try:
                    outcome = measure(
                        clone, workload, method, options.batch_size, options.steps, Path(folder)
                    )
                except RuntimeError as error:
                    failed = True
                    print(f"| {workload} | {method} | {error} | | |", flush=True)
                    continue
                figures = found.setdefault(workload, {})[method] = row(outcome)
                update, other, peak = figures.values()
                line = f"{update:.2f} | {other:.3f} | {peak:,.0f}"
                print(f"| {workload} | {method} | {line} |", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
