"""What the submission logs while training, at a rate that costs next to nothing.

AlgoPerf's metrics logger rewrites its whole file on every call, on the clock. So the log keeps
account of its own cost and writes only while that stays below a fixed share of the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_SHARE = 0.005  # of the run's time
SHORTEST_PAUSE = 1.0  # seconds between two rows
PHASES = ("data", "forward", "factors", "inverses", "precondition", "update")
SPLITS = ("validation", "test")


class TrainingLog:
    """Clock of the phases of a step, and the rows that are logged.

    Attributes:
        seconds: time spent so far in each of `PHASES`.
        reached: "steps_to_target/validation" and the like -> value, once a target is met.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.reached: dict[str, float] = {}
        self._elapsed = 0.0
        self._spent = 0.0
        self._evaluations_seen = 0
        self._last_row = float("-inf")
        self._last_tick: float | None = None

    def add(self, phase: str, seconds: float) -> None:
        """Adds time to a phase."""
        self.seconds[phase] += seconds

    def is_due(self) -> bool:
        """Whether a row may be written now. Call it once a step."""
        now = time.perf_counter()
        if self._last_tick is not None:
            self._elapsed += now - self._last_tick
        self._last_tick = now
        return now - self._last_row >= SHORTEST_PAUSE and (
            self._spent <= LARGEST_SHARE * self._elapsed
        )

    def write(self, logger: Any, metrics: Mapping[str, float], global_step: int) -> None:
        """Writes a row through the workload's metrics logger; nothing where there is none."""
        if logger is None:
            return
        start = time.perf_counter()
        row = {**metrics, **{f"time/{phase}": value for phase, value in self.seconds.items()}}
        logger.append_scalar_metrics(row, global_step)
        self._last_row = time.perf_counter()
        self._spent += self._last_row - start

    def note_targets(
        self, workload: Any, eval_results: Sequence[tuple[int, Mapping[str, float]]], step: int
    ) -> None:
        """Logs the steps and seconds to a target when an evaluation meets it first.

        The evaluation that ends a run has no step after it; the comparison tool and the launchers
        take that one from the evaluations themselves.
        """
        for evaluated_step, result in eval_results[self._evaluations_seen :]:
            for split in SPLITS:
                if f"steps_to_target/{split}" in self.reached or not _is_reached(
                    workload, split, result
                ):
                    continue
                new = {
                    f"steps_to_target/{split}": float(evaluated_step),
                    f"seconds_to_target/{split}": float(result["accumulated_submission_time"]),
                }
                self.reached.update(new)
                self.write(workload.metrics_logger, new, step)
                _set_wandb_summary(new)
        self._evaluations_seen = len(eval_results)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "seconds": dict(self.seconds),
            "reached": dict(self.reached),
            "elapsed": self._elapsed,
            "spent": self._spent,
            "evaluations_seen": self._evaluations_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.seconds = dict(state["seconds"])
        self.reached = dict(state["reached"])
        self._elapsed = float(state["elapsed"])
        self._spent = float(state["spent"])
        self._evaluations_seen = int(state["evaluations_seen"])
        self._last_tick = None


def _is_reached(workload: Any, split: str, result: Mapping[str, float]) -> bool:
    try:
        return bool(getattr(workload, f"has_reached_{split}_target")(result))
    except KeyError:  # an evaluation without this split
        return False


def _set_wandb_summary(values: Mapping[str, float]) -> None:
    """Puts values into the summary of the active wandb run, if wandb is in use."""
    import sys

    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if run is not None:
        run.summary.update(dict(values))
