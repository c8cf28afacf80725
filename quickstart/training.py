"""One training run: AlgoPerf's call order, clock and stop rules, with checkpoints at evaluations.

Differences from AlgoPerf's `train_once`, all on purpose: evaluations come after step 1 and then
at fixed steps, so that steps-to-target has a known resolution; a resumed run continues bit for
bit (generators, data position and log files are part of the checkpoint); an error in an
evaluation ends the run.
"""

import contextlib
import os
import random
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from quickstart import checkpoints, rng
from quickstart.base_workload import QuickstartWorkload
from quickstart.errors import QuickstartError
from quickstart.reporting import Reporters
from quickstart.run_logs import MetricsLogger
from quickstart.submissions import Submission
from submission.algoperf_compat import spec

# Fast methods reach their target within these steps; a coarse grid would be their spread.
EARLY_STEPS = 100


@dataclass(frozen=True)
class RunSettings:
    """What decides a run, besides workload, submission and hyperparameters.

    Attributes:
        rng_seed: decides initial parameters, data order and everything a submission draws.
        batch_size: graphs or images per batch.
        max_global_steps: number of steps after which training ends.
        eval_every: number of steps between evaluations.
        eval_every_early: the same during the first `EARLY_STEPS` steps, None for no difference.
        save_checkpoints: whether to write a checkpoint at each evaluation.
        stop_at_target: whether training ends once both targets are met, as in AlgoPerf.
    """

    rng_seed: int
    batch_size: int
    max_global_steps: int
    eval_every: int
    eval_every_early: int | None = None
    save_checkpoints: bool = True
    stop_at_target: bool = True


class InterruptedRunError(Exception):
    """Ctrl-C or a request to terminate, with the step it came at."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.step = step


def read_clock() -> float:
    """Seconds; waits for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


class TrainingRun:
    """A run from its (possibly restored) beginning to its end.

    Args:
        workload: what to train.
        submission: how to train it.
        hyperparameters: a named tuple for the submission.
        settings: see `RunSettings`.
        folder: the trial's folder, which exists.
        logger: the trial's logger.
        reporter: told about steps and evaluations.

    Raises:
        QuickstartError: if the submission rejects the hyperparameters, or a checkpoint does not
            fit.
    """

    def __init__(
        self,
        workload: QuickstartWorkload,
        submission: Submission,
        hyperparameters: Any,
        settings: RunSettings,
        folder: Path,
        logger: MetricsLogger,
    ) -> None:
        self.workload = workload
        self.submission = submission
        self.hyperparameters = hyperparameters
        self.settings = settings
        self.folder = folder
        self.logger = logger
        keys = rng.split(rng.split(rng.key(settings.rng_seed), 2)[0], 4)
        data_rng, optimizer_rng, model_rng, self.rng = keys
        # A submission may draw from Python's and NumPy's own generators too.
        random.seed(settings.rng_seed)
        np.random.seed(settings.rng_seed % 2**32)
        try:
            self.queue = workload._build_input_queue(data_rng, "train", None, settings.batch_size)
        except ValueError as error:
            raise QuickstartError(f"--batch_size={settings.batch_size}: {error}") from error
        self.model, self.model_state = workload.init_model_fn(model_rng)
        workload.attach_metrics_logger(logger)
        self.optimizer_state = self._init_optimizer_state(optimizer_rng)
        self.train_state: dict[str, Any] = {
            "validation_goal_reached": False,
            "test_goal_reached": False,
            "is_time_remaining": True,
            "last_eval_time": 0,
            "training_complete": False,
            "accumulated_submission_time": 0.0,
            "accumulated_eval_time": 0.0,
            "accumulated_logging_time": 0.0,
            "last_step_end_time": None,
        }
        self.global_step = 0
        self.eval_results: list[tuple[int, dict[str, float]]] = []
        self.preemption_count = 0

    def restore(self) -> list[str]:
        """Goes to the newest readable checkpoint, if there is one; returns problems met."""
        restored, problems = checkpoints.restore(self.folder, self.model, self.optimizer_state)
        if restored is None:
            self.logger.restore({})
            return problems
        self.train_state = restored.train_state
        self.eval_results = [(step, dict(result)) for step, result in restored.eval_results]
        self.global_step = restored.global_step
        self.preemption_count = restored.preemption_count + 1
        self.queue.skip_to(restored.queue_position)
        self.logger.restore(restored.logs)
        return problems

    def train(self, reporter: Reporters) -> str:
        """Trains to the end; returns why it ended: 'target', 'steps', 'time' or 'submission'.

        Raises:
            InterruptedRunError: on Ctrl-C.
        """
        state = self.train_state
        start = read_clock()
        state["last_step_end_time"] = start
        stopped_by_submission = False
        try:
            while not self._is_over():
                step_rng = rng.fold_in(self.rng, self.global_step)
                select_rng, update_rng, prepare_rng, eval_rng = rng.split(step_rng, 4)
                try:
                    self._step(select_rng, update_rng)
                except spec.TrainingCompleteError:
                    state["training_complete"] = stopped_by_submission = True
                self.global_step += 1
                if self.global_step >= self.settings.max_global_steps:
                    state["training_complete"] = True
                now = read_clock()
                state["accumulated_submission_time"] += now - state["last_step_end_time"]
                if self._evaluation_is_due():
                    self._prepare_for_eval(prepare_rng)
                    state["is_time_remaining"] = (
                        state["accumulated_submission_time"] < self.workload.max_allowed_runtime_sec
                    )
                    if state["is_time_remaining"]:
                        self._evaluate(eval_rng, start)
                        reporter.evaluation(
                            self.global_step, self.eval_results[-1][1], self.workload
                        )
                reporter.step(self.global_step, self.workload)
                state["last_step_end_time"] = read_clock()
        except KeyboardInterrupt as error:
            raise InterruptedRunError(self.global_step) from error
        self.logger.append_scalar_metrics(
            {"score": state["accumulated_submission_time"]},
            global_step=self.global_step,
            preemption_count=self.preemption_count,
        )
        self.logger.finish()
        if self._goals_reached():
            return "target"
        if not state["is_time_remaining"]:
            return "time"
        return "submission" if stopped_by_submission else "steps"

    @contextlib.contextmanager
    def _submissions_errors(self, what: str, trace: Path | None = None) -> Iterator[None]:
        """Turns an error of the submission into one line; its traceback goes into a file."""
        try:
            yield
        except QuickstartError:
            raise
        except Exception as error:
            trace = trace or self.folder / "error.txt"
            with contextlib.suppress(OSError):  # of a full disk, say; the message has to come out
                trace.write_text(traceback.format_exc(), encoding="utf-8")
            message = " ".join(str(error).split()) or type(error).__name__
            raise QuickstartError(f"{what}: {message} (traceback: {trace})") from error

    def _init_optimizer_state(self, optimizer_rng: Any) -> dict[str, Any]:
        # A run that is refused leaves nothing in its folder.
        elsewhere = Path(tempfile.gettempdir()) / f"quickstart_error_{os.getpid()}.txt"
        with self._submissions_errors("the submission rejects its hyperparameters", elsewhere):
            state = self.submission.init_optimizer_state(
                self.workload, self.model, self.model_state, self.hyperparameters, optimizer_rng
            )
        unsaved = [key for key, value in state.items() if not hasattr(value, "load_state_dict")]
        if unsaved and self.settings.save_checkpoints:
            raise QuickstartError(
                f"the submission's optimizer state {unsaved[0]!r} has no state_dict and "
                "load_state_dict, so a run could not be resumed: add them or pass "
                "--nosave_checkpoints"
            )
        return dict(state)

    def _step(self, select_rng: Any, update_rng: Any) -> None:
        with self._submissions_errors(f"training ended at step {self.global_step}"):
            batch = self.submission.data_selection(
                self.workload,
                self.queue,
                self.optimizer_state,
                self.model,
                self.model_state,
                self.hyperparameters,
                self.global_step,
                select_rng,
            )
            more = {}
            if self.submission.needs_train_state:
                more["train_state"] = MappingProxyType(self.train_state)
            self.optimizer_state, self.model, self.model_state = self.submission.update_params(
                workload=self.workload,
                current_param_container=self.model,
                current_params_types=self.workload.model_params_types,
                model_state=self.model_state,
                hyperparameters=self.hyperparameters,
                batch=batch,
                loss_type=self.workload.loss_type,
                optimizer_state=self.optimizer_state,
                eval_results=self.eval_results,
                global_step=self.global_step,
                rng=update_rng,
                **more,
            )

    def _prepare_for_eval(self, prepare_rng: Any) -> None:
        if self.submission.prepare_for_eval is None:
            return
        begin = read_clock()
        self.optimizer_state, self.model, self.model_state = self.submission.prepare_for_eval(
            workload=self.workload,
            current_param_container=self.model,
            current_params_types=self.workload.model_params_types,
            model_state=self.model_state,
            hyperparameters=self.hyperparameters,
            loss_type=self.workload.loss_type,
            optimizer_state=self.optimizer_state,
            eval_results=self.eval_results,
            global_step=self.global_step,
            rng=prepare_rng,
        )
        self.train_state["accumulated_submission_time"] += read_clock() - begin

    def _evaluate(self, eval_rng: Any, start: float) -> None:
        state, workload = self.train_state, self.workload
        begin = read_clock()
        result = workload.eval_model(
            workload.eval_batch_size,
            self.model,
            self.model_state,
            eval_rng,
            None,
            None,
            self.global_step,
        )
        state["validation_goal_reached"] |= workload.has_reached_validation_target(result)
        state["test_goal_reached"] |= workload.has_reached_test_target(result)
        end = read_clock()
        state["last_eval_time"] = end
        state["accumulated_eval_time"] += end - begin
        result["score"] = state["accumulated_submission_time"]
        result["total_duration"] = end - start
        for name in ("submission", "eval", "logging"):
            result[f"accumulated_{name}_time"] = state[f"accumulated_{name}_time"]
        self.eval_results.append((self.global_step, result))
        self.logger.append_scalar_metrics(
            result,
            global_step=self.global_step,
            preemption_count=self.preemption_count,
            is_eval=True,
        )
        if self.settings.save_checkpoints:
            self._save_checkpoint()
        state["accumulated_logging_time"] += read_clock() - end

    def _save_checkpoint(self) -> None:
        progress = checkpoints.Restored(
            train_state=self.train_state,
            eval_results=self.eval_results,
            global_step=self.global_step,
            preemption_count=self.preemption_count,
            queue_position=self.queue.position,
            logs=self.logger.contents(),
        )
        checkpoints.save(self.folder, self.model, self.optimizer_state, progress)

    def _evaluation_is_due(self) -> bool:
        every = self.settings.eval_every
        if self.settings.eval_every_early and self.global_step <= EARLY_STEPS:
            every = self.settings.eval_every_early
        return (
            self.global_step == 1
            or self.global_step % every == 0
            or self.train_state["training_complete"]
        )

    def _goals_reached(self) -> bool:
        return bool(
            self.train_state["validation_goal_reached"] and self.train_state["test_goal_reached"]
        )

    def _is_over(self) -> bool:
        return (
            not self.train_state["is_time_remaining"]
            or self.train_state["training_complete"]
            or (self.settings.stop_at_target and self._goals_reached())
        )
