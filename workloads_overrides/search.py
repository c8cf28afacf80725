"""Tuning points that are the same in every process, and in every restart of a run.

AlgoPerf draws the points of a search space in an order that it shuffles with Python's unseeded
generator. Ranks of one run could so train with different hyperparameters (all but the first read
them from a file that the first may not have written yet), and processes that each take one trial
of a study could take the same point twice. And a run that resumes takes the hyperparameters it
began with, whatever the tuning file says by now, without a word.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads_overrides.errors import LaunchError
from workloads_overrides.points import require_valid_points

SEED = 0


def register_search(halton: Any, trials: Path | None, submission: Path | None = None) -> None:
    """Makes `halton.generate_search` reproducible, and checks its points against earlier runs.

    Args:
        halton: AlgoPerf's module `algoperf.halton`.
        trials: The folder that holds `trial_*`, None if it is a new one.
        submission: The submission's file, None to leave the points unchecked.
    """
    original = halton.generate_search

    def generate_search(search_space: Any, num_trials: int) -> Any:
        state = random.getstate()
        random.seed(SEED)
        try:
            points = original(search_space, num_trials)
        finally:
            random.setstate(state)
        drawn = [dict(point._asdict()) for point in points]
        if submission is not None:
            require_valid_points(drawn, submission, "--tuning_search_space")
        if trials is not None:
            require_same_points(drawn, trials)
        return points

    halton.generate_search = generate_search


def require_same_points(points: Sequence[dict[str, Any]], trials: Path) -> None:
    """Checks that trials which exist already have the hyperparameters that they would get now.

    Raises:
        LaunchError: A trial was begun with others.
    """
    for number, point in enumerate(points, start=1):
        path = trials / f"trial_{number}" / "hparams.json"
        try:
            begun_with = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a new trial, or one that another process is just starting
        changed = [
            f"{name} {begun_with.get(name)!r}, now {point.get(name)!r}"
            for name in sorted({*begun_with, *point})
            if begun_with.get(name) != point.get(name)
        ]
        if changed:
            raise LaunchError(
                f"{path.parent} was begun with other hyperparameters ({'; '.join(changed)}): "
                "give a new --experiment_name, or --overwrite"
            )
