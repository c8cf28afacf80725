"""Learning-rate schedules: pure functions of the step.

Both start from 0 and reach the peak after `warmup` steps, as AlgoPerf's target-setting runs do.
A schedule gives the factor (0 to 1) on the peak learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleShape:
    """Args: total and warmup in steps; decay_steps_factor and end_factor for the linear decay."""

    total: int
    warmup: int
    decay_steps_factor: float = 1.0
    end_factor: float = 0.0


def warmup_linear(step: int, shape: ScheduleShape) -> float:
    """Linear warm-up, then linear decay to end_factor, then constant."""
    if step < shape.warmup:
        return step / shape.warmup
    decay_steps = max(int((shape.total - shape.warmup) * shape.decay_steps_factor), 1)
    done = min((step - shape.warmup) / decay_steps, 1.0)
    return 1.0 + (shape.end_factor - 1.0) * done


def warmup_cosine(step: int, shape: ScheduleShape) -> float:
    """Linear warm-up, then half a cosine to 0, then 0."""
    if step < shape.warmup:
        return step / shape.warmup
    done = min((step - shape.warmup) / max(shape.total - shape.warmup, 1), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * done))


SCHEDULES: dict[str, Callable[[int, ScheduleShape], float]] = {
    "warmup_linear": warmup_linear,
    "warmup_cosine": warmup_cosine,
}


def schedule_shape(
    *,
    step_hint: int,
    training_steps: int | None,
    step_hint_factor: float,
    warmup_steps: int | None,
    warmup_fraction: float,
    schedule_factor: float,
    decay_steps_factor: float,
    end_factor: float,
    at_most: int | None = None,
) -> ScheduleShape:
    """The shape from the tunables of the same names and the workload's step hint.

    Args:
        at_most: steps that there is time for; a longer schedule is made shorter, its warm-up too
            where that is a fraction.

    Raises:
        ValueError: the warm-up is not shorter than the schedule.
    """
    total = training_steps if training_steps is not None else int(step_hint_factor * step_hint)
    warmup = warmup_steps if warmup_steps is not None else int(warmup_fraction * total)
    total, warmup = int(schedule_factor * total), int(schedule_factor * warmup)
    if at_most is not None and at_most < total:
        warmup = min(warmup if warmup_steps is not None else warmup * at_most // total, at_most - 1)
        total = at_most
    if total < 1 or warmup >= total:
        raise ValueError(
            f"a warm-up of {warmup} steps does not fit into a schedule of {total} steps "
            f"(the workload's step hint is {step_hint}): lower 'warmup_steps' or raise "
            "'training_steps'"
        )
    return ScheduleShape(total, warmup, decay_steps_factor, end_factor)
