"""Synthetic logs in AlgoPerf's format, for the tests and for measuring the reader by hand.

    python tests/steps_to_target/make_fixtures.py DIR             the small set that the tests use
    python tests/steps_to_target/make_fixtures.py DIR --trials 500 --evaluations 300

Nothing here is taken from a real run: curves are saturating exponentials with seeded noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKLOADS: dict[str, dict[str, Any]] = {
    "ogbg": {
        "metric": "mean_average_precision",
        "validation": 0.28098,
        "test": 0.268729,
        "start": 0.02,
        "limit": 12011,
        "step_hint": 52000,
    },
    "imagenet_vit": {
        "metric": "accuracy",
        "validation": 0.77309,
        "test": 0.6519,
        "start": 0.001,
        "limit": 69768,
        "step_hint": 167999,
    },
    "librispeech_conformer": {
        "metric": "wer",
        "validation": 0.085884,
        "test": 0.052981,
        "start": 1.2,
        "limit": 58015,
        "step_hint": 76000,
    },
    "molecules": {
        "metric": "mean_average_precision",
        "validation": 0.6,
        "test": 0.58,
        "start": 0.05,
        "limit": 600,
        "step_hint": 500,
    },
}


def progress(share: float) -> float:
    """A saturating exponential from 0 (share 0) through 1 (share 1)."""
    return (1 - math.exp(-3.0 * share)) / (1 - math.exp(-3.0))


def evaluation(
    workload: str,
    step: int,
    seconds: float,
    value: float,
    test_value: float | None = None,
    preemptions: int = 0,
) -> dict[str, Any]:
    """One row of eval_measurements.csv."""
    metric = WORKLOADS[workload]["metric"]
    return {
        "accumulated_eval_time": 0.2 * seconds,
        "accumulated_logging_time": 0.001 * seconds,
        "accumulated_submission_time": seconds,
        "global_step": step,
        "preemption_count": preemptions,
        "score": seconds,
        "test/loss": 0.05,
        f"test/{metric}": value - 0.012 if test_value is None else test_value,
        "test/num_examples": 43793,
        "total_duration": 1.3 * seconds,
        "train/loss": 0.03,
        "validation/loss": 0.045,
        f"validation/{metric}": value,
        "validation/num_examples": 43793,
    }


def rows_to(
    workload: str,
    cross_step: int | None,
    *,
    count: int = 20,
    steps: int = 20000,
    seconds: float = 5000.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Evaluations from step 1 on; the metric meets its target from ``cross_step`` on (None: never).

    The rows stop at the first evaluation that meets it, as AlgoPerf does.
    """
    facts = WORKLOADS[workload]
    noise = random.Random(seed)
    target, start, test_target = facts["validation"], facts["start"], facts["test"]
    rows = []
    for index in range(count):
        share = index / (count - 1)
        step = max(1, round(share * steps))
        way = progress(step / (cross_step or 1.5 * steps)) * (1 + 1e-6)
        if cross_step is None:
            way = min(way, 0.95) - 0.01 * noise.random()
        value = start + way * (target - start)
        test = start + way * (test_target - start)
        rows.append(evaluation(workload, step, max(1.0, share * seconds), value, test))
        if cross_step is not None and step >= cross_step:
            break
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows the way pandas does: all columns, empty where a row lacks one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def training_rows(rows: Sequence[dict[str, Any]], *, timed: bool) -> list[dict[str, Any]]:
    """What the submission logs between evaluations."""
    logged = []
    for row in rows:
        step = row["global_step"]
        entry: dict[str, Any] = {"global_step": step, "loss": 0.5 / (1 + step), "grad_norm": 0.1}
        if timed:
            total = row["accumulated_submission_time"]
            parts = {
                "forward": 0.3,
                "factors": 0.1,
                "inverses": 0.05,
                "precondition": 0.1,
                "update": 0.35,
                "data": 0.1,
            }
            entry |= {f"time/{name}": share * total for name, share in parts.items()}
        logged.append(entry)
    return logged


def _delayed(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    delay = zlib.crc32("/".join(folder.parts[-4:]).encode(errors="replace")) / 2**32 * 1e-3
    names = {"accumulated_submission_time", "score", "total_duration"} & row.keys()
    return row | {name: row[name] + delay for name in names}


def write_trial(
    folder: Path,
    workload: str,
    rows: Sequence[dict[str, Any]],
    *,
    final: bool = True,
    final_seconds: float | None = None,
    final_step: int | None = None,
    hparams: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    timed: bool = False,
    own_times: bool = True,
) -> Path:
    """Write one trial folder with all five files.

    No two runs take the same time to the last digit; ``own_times`` sees to that.
    """
    facts = WORKLOADS[workload]
    folder.mkdir(parents=True, exist_ok=True)
    if own_times:
        rows = [_delayed(row, folder) for row in rows]
    write_csv(folder / "eval_measurements.csv", rows)
    everything: list[dict[str, Any]] = []
    for row, training in zip(rows, training_rows(rows, timed=timed), strict=True):
        everything += [training, row]
    if final and rows:
        seconds = final_seconds or rows[-1]["accumulated_submission_time"]
        step = final_step or rows[-1]["global_step"]
        everything.append({"global_step": step, "score": seconds, "preemption_count": 0})
    write_csv(folder / "measurements.csv", everything)
    files = {
        "hparams.json": {"learning_rate": 0.001, "beta1": 0.9} if hparams is None else hparams,
        "meta_data_0.json": {
            "workload.target_metric_name": facts["metric"],
            "workload.validation_target_value": facts["validation"],
            "workload.test_target_value": facts["test"],
            "workload.max_allowed_runtime_sec": facts["limit"],
            "workload.step_hint": facts["step_hint"],
            "gpu_model_name": "Tesla V100-SXM2-16GB",
            "gpu_count": 8,
            "git_commit_hash": "0123456789abcdef",
        }
        | (meta or {}),
        "flags_0.json": {
            "workload": workload,
            "framework": "pytorch",
            "tuning_ruleset": "external",
            "max_global_steps": None,
        }
        | (flags or {}),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def study_folder(root: Path, method: str, study: int, workload: str, trial: int = 1) -> Path:
    """``<method>/study_<n>/<workload>_pytorch/trial_<n>``."""
    return root / method / f"study_{study}" / f"{workload}_pytorch" / f"trial_{trial}"


def make_small_set(root: Path) -> None:
    """Three methods on two workloads with three seeds; all statuses but "unreadable" occur."""
    for seed, (slow, fast) in enumerate([(16000, 8000), (17000, 9000), (18000, 7000)]):
        write_trial(study_folder(root, "nesterov", seed, "ogbg"), "ogbg", rows_to("ogbg", slow))
        write_trial(
            study_folder(root, "kfac_reduce", seed, "ogbg"),
            "ogbg",
            rows_to("ogbg", fast),
            timed=True,
        )
    missed = rows_to("ogbg", None)
    write_trial(study_folder(root, "adamw", 0, "ogbg"), "ogbg", missed)
    write_trial(
        study_folder(root, "adamw", 1, "ogbg"),
        "ogbg",
        missed,
        final_seconds=12013.0,
        final_step=20500,
    )
    write_trial(study_folder(root, "adamw", 2, "ogbg"), "ogbg", missed[:9], final=False)
    write_trial(study_folder(root, "adamw", 3, "ogbg"), "ogbg", missed[:1], final=False)
    for seed, (slow, fast) in enumerate([(15000, 11000), (14000, 12000), (15000, 10000)]):
        for method, step in (("nesterov", slow), ("kfac_reduce", fast)):
            name = "librispeech_conformer"
            write_trial(study_folder(root, method, seed, name), name, rows_to(name, step))


def make_large_set(root: Path, trials: int, evaluations: int) -> None:
    """Many trials of two methods, five trials per study, with full logs."""
    for index in range(trials):
        method = "nesterov" if index % 2 else "kfac_reduce"
        study, trial = divmod(index // 2, 5)
        rows = rows_to("ogbg", 20000, count=evaluations, seed=index)
        write_trial(
            study_folder(root, method, study, "ogbg", trial + 1),
            "ogbg",
            rows,
            hparams={"learning_rate": 0.001 * (index + 1)},
            timed=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--evaluations", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.trials:
        make_large_set(arguments.folder, arguments.trials, arguments.evaluations)
    else:
        make_small_set(arguments.folder)


if __name__ == "__main__":
    main()
