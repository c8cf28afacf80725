"""What a run of the submission carries besides the optimizer and K-FAC."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hyperparameters import Hyperparameters
from .kfac import Preconditioner
from .kfac.discovery import unwrap
from .kfac.ranks.collectives import rank, world_size
from .pace import Pace
from .schedules import ScheduleShape
from .training_log import TrainingLog

logger = logging.getLogger(__name__)
# AlgoPerf's runner leaves logging at warnings; what trains what has to be seen in every run's log.
logger.setLevel(logging.INFO)


class BadStepsError(RuntimeError):
    """Too many steps in a row had a loss, gradient or update that is not finite."""


class UnwrappedModelError(RuntimeError):
    """Several ranks, and a model that does not average its gradients over them."""


class Run:
    """Settings, schedule, log and the counters of skipped steps.

    Args:
        settings: the validated hyperparameters.
        workload: asked for its step hint and allowed run time.
        model: as the run begins with it, in its wrappers.
        time_factor: what the allowed run time is multiplied by.

    Attributes:
        shape: of the schedule.
        kinds_of_rows: layer name -> kind of its rows, learnt from ragged batches.
        skipped: number of steps that were skipped because something was not finite.
    """

    def __init__(
        self,
        settings: Hyperparameters,
        workload: Any,
        model: nn.Module,
        time_factor: float = 1.0,
    ) -> None:
        self.settings = settings
        self._model = model
        self._step_hint = int(workload.step_hint)
        self.pace: Pace | None = None
        if settings.runtime_share is not None:
            allowed = time_factor * float(workload.max_allowed_runtime_sec)
            self.pace = Pace(settings.runtime_share * allowed)
        self.shape = self._shape()
        self.log = TrainingLog()
        self.kinds_of_rows: dict[str, str] = {}
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._buffers: list[Tensor] = []
        self._reported = False

    def _shape(self) -> ScheduleShape:
        fits = None if self.pace is None else self.pace.fits
        return self.settings.schedule_shape(self._step_hint, fits)

    def note_time(self, step: int, train_state: Mapping[str, Any] | None) -> None:
        """Told before a step; fits the schedule to the allowed run time once the speed is known."""
        seconds = (train_state or {}).get("accumulated_submission_time")
        if self.pace is None or self.pace.fits is not None or seconds is None:
            return
        self.pace.note(step, float(seconds), next(self._model.parameters()).device)
        if self.pace.fits is not None:
            before, self.shape = self.shape, self._shape()
            if rank() == 0:
                logger.info(
                    "%d steps fit into %.0f s: the schedule has %d steps (it had %d)",
                    self.pace.fits, self.pace.allowed, self.shape.total, before.total,
                )  # fmt: skip

    def rewrapped(self, model: nn.Module) -> nn.Module:
        """The model to train: the one given, in the wrapper that the run began with.

        AlgoPerf restores a checkpoint into the module inside DistributedDataParallel and hands that
        module back, without the wrapper: its gradients would not be averaged, and the ranks would
        drift apart unnoticed. The wrapper of the beginning still holds the very same module.

        Raises:
            UnwrappedModelError: there are several ranks, and the model is neither wrapped nor the
                one that the run began with.
        """
        if _is_parallel(model) or not (_is_parallel(self._model) or world_size() > 1):
            return model
        if unwrap(model) is unwrap(self._model):
            return self._model
        raise UnwrappedModelError(
            f"training runs on {world_size()} ranks, but got a {type(model).__name__} that is "
            "neither in DistributedDataParallel nor the model that init_optimizer_state got: its "
            "gradients would not be averaged over the ranks. Wrap it in DistributedDataParallel "
            "before init_optimizer_state."
        )

    def remember_buffers(self, model: nn.Module) -> None:
        """Copies the running statistics, before a forward pass changes them."""
        buffers = [b for b in model.buffers() if not b.is_sparse]
        if not buffers:
            return
        shapes = [(b.shape, b.dtype, b.device) for b in buffers]
        if shapes != [(b.shape, b.dtype, b.device) for b in self._buffers]:
            self._buffers = [torch.empty_like(b) for b in buffers]
        torch._foreach_copy_(self._buffers, buffers)

    def restore_buffers(self, model: nn.Module) -> None:
        """Puts the running statistics back, after a forward pass that must not count."""
        buffers = [b for b in model.buffers() if not b.is_sparse]
        same = [b.shape for b in buffers] == [b.shape for b in self._buffers]
        if buffers and same:  # a forward pass may make buffers of its own
            torch._foreach_copy_(buffers, self._buffers)

    def accepts(
        self, loss_is_finite: Tensor, grad_norm: Tensor, update_norm: Tensor, global_step: int
    ) -> bool:
        """Whether a step may be taken: loss, gradient and preconditioned gradient are finite.

        All three are the same on all ranks, so that these decide alike.

        Raises:
            BadStepsError: `max_failures` steps in a row were not.
        """
        if bool(loss_is_finite & torch.isfinite(grad_norm) & torch.isfinite(update_norm)):
            self._skipped_in_a_row = 0
            return True
        self.skipped += 1
        self._skipped_in_a_row += 1
        logger.warning(
            "step %d is skipped: its loss, gradient or update is not finite", global_step
        )
        if self._skipped_in_a_row >= self.settings.max_failures:
            raise BadStepsError(
                f"{self._skipped_in_a_row} steps in a row had a loss, gradient or update that is "
                f"not finite, the last at step {global_step}. Lower 'learning_rate' (now "
                f"{self.settings.learning_rate:g}) or raise 'damping' ({self.settings.damping:g})."
            )
        return False

    def after_step(
        self,
        workload: Any,
        kfac: Preconditioner | None,
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
            "pace": None if self.pace is None else self.pace.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.log.load_state_dict(state["log"])
        self.kinds_of_rows = dict(state["kinds_of_rows"])
        self.skipped = int(state["skipped"])
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        if self.pace is not None and state.get("pace") is not None:
            self.pace.load_state_dict(state["pace"])
            self.shape = self._shape()


def _is_parallel(model: nn.Module) -> bool:
    """Whether one of the wrappers around a model adds up gradients over ranks or devices."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return True
        inner = getattr(inner, "_orig_mod", None)
    return False
