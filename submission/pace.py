"""A schedule that ends within the allowed run time, at the speed that training has.

AlgoPerf stops a run after a number of seconds, not of steps, and its step hint is what its baseline
does in that time. A schedule of a share of the step hint would not end in time on a slower machine
or with dearer steps. So the speed is measured once, early in the run, over steps that are like all
others, and the schedule is cut to the steps that fit; from then on its length is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .kfac.ranks.collectives import world_size

# Steps of this process between which the speed is measured: compiling and the early updates of
# K-FAC's factors come before; the number between is a multiple of the usual update intervals.
FIRST, LAST = 100, 300


def steps_that_fit(allowed: float, used: float, step: int, seconds_per_step: float) -> int:
    """Number of steps from the beginning of the run until the allowed time is used.

    Args:
        allowed: seconds of training time for the schedule.
        used: seconds of training time so far.
        step: number of steps so far.
        seconds_per_step: what one takes from now on.
    """
    return step + max(int((allowed - used) / seconds_per_step), 0)


@dataclass
class Pace:
    """Measures the speed of a run, and says how many steps fit.

    Args:
        allowed: seconds of training time for the schedule.

    Attributes:
        fits: number of steps that fit, once it is known; then it never changes.
    """

    allowed: float
    fits: int | None = None
    _calls: int = 0
    _began: tuple[int, float] = (0, 0.0)  # steps and seconds at the beginning of the measurement

    def note(self, step: int, seconds: float, device: torch.device) -> None:
        """Told before every step how many steps came before, and their seconds altogether."""
        if self.fits is not None:
            return
        self._calls += 1  # a resumed run has to compile again, and begins to measure again
        if self._calls == FIRST:
            self._began = step, seconds
        if self._calls == LAST:
            steps, elapsed = step - self._began[0], seconds - self._began[1]
            mine = steps_that_fit(self.allowed, seconds, step, max(elapsed, 1e-9) / steps)
            self.fits = _least_of_ranks(mine, device)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"fits": self.fits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.fits = state["fits"]


def _least_of_ranks(steps: int, device: torch.device) -> int:
    if world_size() == 1:
        return steps
    least = torch.tensor(steps, dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
