"""Tunes the learning rates of `imagenet_vit` and `every_step` on the digits: `python -m ...`.

Every method tries the same learning rates, one run each with a seed that no comparison uses; the
best validation accuracy of a run decides. Writes the points to experiments/settings/images_*.json
and everything that was tried to experiments/settings/images_tuning.json. The target of the
comparisons is the highest multiple of 0.01 below what the chosen reference reached with each of
three more seeds of that kind, so it is one that the tuned reference just reaches.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import results
from quickstart import settings
from quickstart.errors import run_reporting_errors, writing
from quickstart.parallel import Job, run_jobs
from quickstart.study import DEFAULT_SUBMISSION, console_for_tables
from steps_to_target import load_runs

SETTINGS = Path(__file__).resolve().parent / "settings"
RECORD = SETTINGS / "images_tuning.json"
METHODS = (
    "nadamw",
    "kfac_expand",
    "kfac_reduce",
    "kfac_expand_every_step",
    "kfac_reduce_every_step",
)
REFERENCE = METHODS[0]
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
TARGET_SEEDS = (101, 102, 103)
STEPS = 300
EVERY_STEP = {
    "factor_decay": 0.95,
    "factor_update_steps": 1,
    "inverse_update_steps": 10,
    "grad_clip": 1.0,
}

Point = dict[str, Any]


def point_file(method: str) -> Path:
    """Where a method's tuned point lies."""
    return SETTINGS / f"images_{method}.json"


def base_point(method: str) -> Point:
    """The quickstart's point for images, with the changes of Figure 5 where they are wanted."""
    parts = method.removesuffix("_every_step")
    name = parts if method == REFERENCE else f"{parts}_nadamw"
    point: Point = settings.read_json(settings.method_file("images", name))[0]
    return {**point, **(EVERY_STEP if method.endswith("every_step") else {})}


def accuracies(
    wanted: list[tuple[str, Point, int]], folder: Path, jobs: int, console: Console
) -> list[float]:
    """Best validation accuracy of a run of each method, point and seed."""
    prepared = []
    for number, (method, point, seed) in enumerate(wanted):
        path = folder / "points" / f"{number}.json"
        with writing(path) as temporary:
            temporary.write_text(json.dumps([point]), encoding="utf-8")
        arguments = [
            "--workload=images",
            f"--submission_path={DEFAULT_SUBMISSION}",
            f"--tuning_search_space={path}",
            f"--experiment_dir={folder / 'runs'}",
            f"--experiment_name={number}/study_{seed}",
            f"--rng_seed={seed}",
            f"--max_global_steps={STEPS}",
            "--nostop_at_target",
            "--nosave_checkpoints",
            "--overwrite",
        ]
        log = folder / "logs" / f"{number}.log"
        prepared.append(Job(f"{number}/study_{seed}", arguments, log))
        console.print(f"{number}: {method}, learning rate {point['learning_rate']:g}, seed {seed}")
    run_jobs(prepared, at_once=jobs, steps=STEPS, metric="accuracy", console=console)
    best = []
    for job in prepared:
        loaded = load_runs([str(folder / "runs" / job.name)])
        # A run that diverged ends early or evaluates to NaN.
        values = [float(v) for run in loaded for v in run.values if math.isfinite(float(v))]
        best.append(max(values, default=0.0))
    return best


def below(value: float) -> float:
    """The highest multiple of 0.01 below a value."""
    return (math.ceil(value * 100 - 1e-9) - 1) / 100


def main() -> int:
    """Tunes all methods and writes points and record."""
    parser = argparse.ArgumentParser(prog="python -m experiments.image_tuning", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--folder", type=Path, default=results.DEFAULT_FOLDER / "image_tuning")
    options = parser.parse_args()
    console = console_for_tables()
    folder = options.folder.resolve()
    wanted = [
        (method, {**base_point(method), "learning_rate": rate}, TUNING_SEED)
        for method in METHODS
        for rate in LEARNING_RATES
    ]
    reached = accuracies(wanted, folder / "tuning", options.jobs, console)
    record: dict[str, Any] = {"steps": STEPS, "tuning_seed": TUNING_SEED, "tried": []}
    chosen: dict[str, tuple[float, Point]] = {}
    for (method, point, _), accuracy in zip(wanted, reached, strict=True):
        rate = point["learning_rate"]
        entry = {"method": method, "learning_rate": rate, "best_accuracy": accuracy}
        record["tried"].append(entry)
        if method not in chosen or accuracy > chosen[method][0]:
            chosen[method] = (accuracy, point)
    reference = [(REFERENCE, chosen[REFERENCE][1], seed) for seed in TARGET_SEEDS]
    values = accuracies(reference, folder / "target", options.jobs, console)
    record["reference_with_other_seeds"] = dict(zip(map(str, TARGET_SEEDS), values, strict=True))
    record["target"] = below(min(values))
    for method, (_, point) in chosen.items():
        _write(point_file(method), [point])
    _write(RECORD, record)
    console.print(f"target {record['target']}; points and record: {SETTINGS}")
    return 0


def _write(path: Path, content: Any) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_reporting_errors(main)
