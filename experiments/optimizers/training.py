"""One training run: the same loop for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from experiments import results
from experiments.optimizers.methods import WARMUP_FRACTION, Method, Point, Stepper
from experiments.optimizers.task import Batch, Task
from submission.kfac import KFACError, OwnGradients
from submission.schedules import ScheduleShape, warmup_linear

# What the engine and torch raise once numbers have grown too large.
DIVERGED = (KFACError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Evaluation:
    """After `step` steps, which took `seconds` without evaluations: the metric and the last loss.

    `metric` is None if it was not finite.
    """

    step: int
    seconds: float
    metric: float | None
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What a run gave. `problem` says why it ended early, if it did."""

    evaluations: tuple[Evaluation, ...]
    seconds: float
    problem: str | None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def schedule(steps: int, end_factor: float = 0.0) -> ScheduleShape:
    """Linear warm-up, then linear decay to a part of the learning rate."""
    return ScheduleShape(steps, int(WARMUP_FRACTION * steps), end_factor=end_factor)


def train_step(task: Task, model: nn.Module, stepper: Stepper, batch: Batch) -> torch.Tensor:
    """One step; returns the loss, which may be on a GPU still."""
    kfac = stepper.kfac
    stepper.optimizer.zero_grad(set_to_none=True)
    due = kfac if kfac is not None and kfac.factors_due else None
    with due.record(task.sharing(model, batch)) if due else nullcontext():
        logits = model(batch["inputs"])
    loss = task.loss(logits, batch)
    if due:
        mask, targets = batch.get("weights"), batch["targets"] if task.has_labels else None
        is_own = due.config.fisher_type == "empirical" and not task.has_labels
        likelihood = OwnGradients() if is_own else task.likelihood
        due.update(logits, likelihood, mask=mask, targets=targets, loss=loss)
    torch.autograd.backward(loss)
    if kfac is not None:
        kfac.precondition()
    stepper.optimizer.step()
    return loss.detach()


def train(task: Task, method: Method, point: Point, seed: int) -> Outcome:
    """Trains for the task's number of steps, with an evaluation every few of them."""
    model = task.make_model(seed)
    model.train()
    stepper = method.build(model, task, point, seed)
    batches = iter(task.batches(seed))
    shape = schedule(task.length.steps, 1.0 if stepper.is_schedule_free else 0.0)
    evaluations: list[Evaluation] = []
    seconds = 0.0
    problem = None
    for step in range(task.length.steps):
        start = time.perf_counter()
        try:
            loss = _one(task, model, stepper, batches, warmup_linear(step, shape))
        except DIVERGED as error:
            problem = f"step {step}: {type(error).__name__}: {error}"
            break
        results.synchronize(task.device)
        seconds += time.perf_counter() - start
        done = step + 1
        if done % task.length.eval_every == 0 or done == task.length.steps:
            value = float(loss)
            if not math.isfinite(value):
                problem = f"step {done}: the loss is {value}"
                break
            with stepper.evaluating():
                metric = task.evaluate(model)
            evaluations.append(
                Evaluation(done, seconds, metric if math.isfinite(metric) else None, value)
            )
    return Outcome(tuple(evaluations), seconds, problem)


def _one(
    task: Task, model: nn.Module, stepper: Stepper, batches: Iterator[Batch], factor: float
) -> torch.Tensor:
    batch = next(batches)
    stepper.scale_learning_rates(factor)
    return train_step(task, model, stepper, batch)
