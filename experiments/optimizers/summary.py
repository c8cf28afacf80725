"""What the logs say: targets, steps and seconds to them, and how settings carry over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.optimizers.logs import Log
from experiments.optimizers.methods import METHODS, Point, point_key
from experiments.optimizers.study import (
    SEARCH_SPACE,
    TUNING_SEED,
    best_of,
    search_space_points,
)
from experiments.tables import mean_and_error


@dataclass(frozen=True)
class TaskLogs:
    """The logs of one task in one setting.

    Attributes:
        tuning: method -> its tuning runs, in the order of its points; complete ones only.
        seeds: method -> the runs of its chosen point, by seed.
        ablation: point key -> the runs with that point, by seed.
        search_space: the runs of the submission's search space as it is now.
        one_setting: the runs of its first point with the study's seeds.
    """

    task: str
    setting: Mapping[str, object]
    metric: str
    higher_is_better: bool
    tuning: Mapping[str, Sequence[Log]]
    seeds: Mapping[str, Sequence[Log]]
    ablation: Mapping[str, Sequence[Log]]
    search_space: Sequence[Log]
    one_setting: Sequence[Log] = ()

    @property
    def name(self) -> str:
        """Tells it from the same task in another length."""
        return f"{self.task}, {self.setting['steps']} steps"

    def chosen(self, method: str) -> Log:
        """The tuning run that had the best metric."""
        return best_of(self.tuning[method])


def group(logs: Sequence[Log]) -> list[TaskLogs]:
    """The logs by task and setting, in the order in which they come."""
    settings: dict[tuple[str, str], list[Log]] = {}
    for log in logs:
        settings.setdefault((log.run.task, point_key(log.run.setting)), []).append(log)
    return [_task_logs(found) for found in settings.values()]


def _task_logs(found: Sequence[Log]) -> TaskLogs:
    tuning: dict[str, list[Log]] = {}
    seeds: dict[str, list[Log]] = {}
    for name, method in METHODS.items():
        own = [log for log in found if log.run.method == name]
        tried = {point_key(log.run.point): log for log in own if log.run.seed == TUNING_SEED}
        order = [point_key(point) for point in method.points]
        if not all(key in tried for key in order):
            continue
        tuning[name] = [tried[key] for key in order]
        key = point_key(best_of(tuning[name]).run.point)
        later = [log for log in own if log.run.seed != TUNING_SEED]
        of_point = [log for log in later if point_key(log.run.point) == key]
        if of_point:
            seeds[name] = sorted(of_point, key=lambda log: log.run.seed)
    ablation: dict[str, list[Log]] = {}
    for log in found:
        if log.run.method == "ablation":
            ablation.setdefault(point_key(log.run.point), []).append(log)
    space = [point_key(point) for point in search_space_points()]
    own = [log for log in found if log.run.method == SEARCH_SPACE]
    searched = [
        log for log in own if point_key(log.run.point) in space and log.run.seed == TUNING_SEED
    ]
    one = [
        log for log in own if point_key(log.run.point) == space[0] and log.run.seed != TUNING_SEED
    ]
    first = found[0]
    return TaskLogs(
        first.run.task, first.run.setting, first.metric, first.higher_is_better,
        tuning, seeds, ablation, searched, sorted(one, key=lambda log: log.run.seed),
    )  # fmt: skip


def target_of(runs: Sequence[Log]) -> float | None:
    """What a reference just reaches: the best metric of its worst seed; None if a seed has none."""
    worst = min(runs, key=lambda log: log.score)
    return worst.best


@dataclass(frozen=True)
class Reached:
    """How a method's seeds came to a target; `steps` and `seconds` of those that did."""

    runs: int
    steps: list[float]
    seconds: list[float]

    @property
    def all_did(self) -> bool:
        """Whether every seed reached it."""
        return len(self.steps) == self.runs


def reached(runs: Sequence[Log], target: float) -> Reached:
    """Steps and seconds of each seed to the first evaluation that is as good as the target."""
    hits = [hit for log in runs if (hit := log.first_at(target)) is not None]
    return Reached(len(runs), [float(h.step) for h in hits], [h.seconds for h in hits])


Uncertain = tuple[float, float]  # a mean and its standard error


def product(a: Uncertain | None, b: Uncertain | None) -> Uncertain | None:
    """The product of independent means, and its standard error to first order."""
    if a is None or b is None:
        return None
    return a[0] * b[0], float(((a[1] * b[0]) ** 2 + (a[0] * b[1]) ** 2) ** 0.5)


def mean_ratio(a: Sequence[float], b: Sequence[float]) -> Uncertain:
    """Mean of a over mean of b, and its standard error to first order."""
    (x, dx), (y, dy) = mean_and_error(list(a)), mean_and_error(list(b))
    ratio = x / y
    return ratio, ratio * float((dx / x) ** 2 + (dy / y) ** 2) ** 0.5


def best_values(runs: Sequence[Log]) -> list[float]:
    """The best metric of each seed that has one."""
    return [log.best for log in runs if log.best is not None]


@dataclass(frozen=True)
class Carried:
    """One point on every task, all fixed."""

    method: str
    point: Point
    slowdown: Mapping[str, float | None]
    loss: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest slowdown; infinite where a task's target was not reached."""
        return max(float("inf") if s is None else s for s in self.slowdown.values())


def carried_over(tasks: Sequence[TaskLogs], methods: Sequence[str]) -> list[Carried]:
    """Every setting that was tried on all tasks, from the tuning runs, the best first.

    Tasks that NAdamW was not tuned on are left out.

    `slowdown` is its steps to what tuned NAdamW reaches in tuning, as a multiple of the fewest of
    all settings of all these methods; `loss` how far its best metric is behind theirs.
    """
    tasks = [task for task in tasks if "nadamw" in task.tuning]
    per_task: list[dict[tuple[str, str], Log]] = []
    fewest: dict[str, float | None] = {}
    top: dict[str, float] = {}
    for task in tasks:
        settings = {
            (method, point_key(log.run.point)): log
            for method in methods
            for log in task.tuning.get(method, ())
        }
        per_task.append(settings)
        target = task.chosen("nadamw").best
        all_logs = list(settings.values())
        hits = [log.first_at(target) for log in all_logs] if target is not None else []
        fewest[task.name] = min((hit.step for hit in hits if hit is not None), default=None)
        top[task.name] = max((log.score for log in all_logs), default=float("-inf"))
    found = []
    for key in [k for k in (per_task[0] if per_task else {}) if all(k in s for s in per_task)]:
        slowdown: dict[str, float | None] = {}
        loss: dict[str, float] = {}
        for task, settings in zip(tasks, per_task, strict=True):
            log, least = settings[key], fewest[task.name]
            target = task.chosen("nadamw").best
            hit = None if target is None else log.first_at(target)
            slowdown[task.name] = None if hit is None or not least else hit.step / least
            loss[task.name] = top[task.name] - log.score
        found.append(Carried(key[0], per_task[0][key].run.point, slowdown, loss))
    return sorted(found, key=lambda c: (c.worst, sum(c.loss.values())))
