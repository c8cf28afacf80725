"""What a run of the submission carries besides the optimizer and K-FAC."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters
from .kfac import KFAC
from .kfac.distributed import rank
from .schedules import schedule_shape
from .training_log import TrainingLog

logger = logging.getLogger(__name__)
# AlgoPerf's runner leaves logging at warnings; what trains what has to be seen in every run's log.
logger.setLevel(logging.INFO)


class BadStepsError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Run:
    """Settings, schedule, log and the counters of skipped steps.

    Args:
        settings: the validated hyperparameters.
        workload: asked for its step hint.

    Attributes:
        kinds_of_rows: layer name -> kind of its rows, learnt from ragged batches.
        skipped: number of steps that were skipped because something was not finite.
    """

    def __init__(self, settings: Hyperparameters, workload: Any) -> None:
        self.settings = settings
        self.shape = schedule_shape(
            step_hint=int(workload.step_hint),
            training_steps=settings.training_steps,
            step_hint_factor=settings.step_hint_factor,
            warmup_steps=settings.warmup_steps,
            warmup_fraction=settings.warmup_fraction,
            schedule_factor=settings.schedule_factor,
            decay_steps_factor=settings.decay_steps_factor,
            end_factor=settings.end_factor,
        )
        self.log = TrainingLog()
        self.kinds_of_rows: dict[str, str] = {}
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._reported = False

    def accepts(self, loss: Tensor, grad_norm: Tensor, global_step: int) -> bool:
        """Whether a step may be taken: loss and gradient are finite.

        Raises:
            BadStepsError: `max_failures` steps in a row were not.
        """
        if bool(torch.isfinite(loss.detach()) & torch.isfinite(grad_norm)):
            self._skipped_in_a_row = 0
            return True
        self.skipped += 1
        self._skipped_in_a_row += 1
        logger.warning("step %d is skipped: its loss or gradient is not finite", global_step)
        if self._skipped_in_a_row >= self.settings.max_failures:
            raise BadStepsError(
                f"{self._skipped_in_a_row} steps in a row had a loss or gradient that is not "
                f"finite, the last at step {global_step}. Lower 'learning_rate' (now "
                f"{self.settings.learning_rate:g}) or raise 'damping' ({self.settings.damping:g})."
            )
        return False

    def after_step(
        self,
        workload: Any,
        kfac: KFAC | None,
        eval_results: Sequence[tuple[int, Mapping[str, float]]],
        global_step: int,
        values: Mapping[str, Any],
    ) -> None:
        """Reports what trains what (once), targets when they are met, and a row when it is due."""
        if kfac is not None:
            for phase in ("factors", "inverses", "precondition"):
                self.log.seconds[phase] = kfac.seconds[phase]
            if not self._reported and rank() == 0:
                self._reported = True
                logger.info("K-FAC:\n%s", kfac.describe())
        if rank() != 0:
            return
        self.log.note_targets(workload, eval_results, global_step)
        if not self.log.is_due():
            return
        row = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in values.items()}
        row["skipped_steps"] = float(self.skipped)
        if kfac is not None:
            row["damping"] = kfac.damping
            row["dropped_updates"] = float(sum(kfac.failures.values()))
        self.log.write(workload.metrics_logger, row, global_step)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "log": self.log.state_dict(),
            "kinds_of_rows": dict(self.kinds_of_rows),
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.log.load_state_dict(state["log"])
        self.kinds_of_rows = dict(state["kinds_of_rows"])
        self.skipped = int(state["skipped"])
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
