"""Which runs there are, in which order, and doing them.

1. *Tuning*: every point of every method, one run each with a seed of its own.
2. *Seeds*: the point whose tuning run had the best metric, with the seeds of the study.
3. *Timing*: steps of all methods taken in turns, since other work on the machine changes speeds.
4. *Search space*: the points of tuning_search_space.json, one run each with the seed of tuning; the
   first also with the seeds of the study.
5. *Ablation*: one setting of the best of ours changed at a time.

A run that has a log is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import results
from experiments.optimizers import ablation, logs
from experiments.optimizers.logs import Log, Run
from experiments.optimizers.methods import METHODS, Method, Point, find, point_key
from experiments.optimizers.task import Task
from experiments.optimizers.training import train

TUNING_SEED = 100
PHASES = ("tuning", "seeds", "timing", "search_space", "ablation")
SEARCH_SPACE = "search_space"


@dataclass
class Study:
    """The runs of some tasks and methods in one folder.

    Attributes:
        folder: of the logs.
        tasks, methods: what is studied; methods by name.
        seeds: of the runs after tuning.
    """

    folder: Path
    tasks: Sequence[Task]
    methods: Sequence[str]
    seeds: Sequence[int]

    def tuning(self) -> Iterator[tuple[Task, Run]]:
        """All tuning runs."""
        for task in self.tasks:
            for name in self.methods:
                for point in find(name).points:
                    yield task, Run(task.name, task.setting, name, point, TUNING_SEED)

    def after_tuning(self) -> Iterator[tuple[Task, Run]]:
        """The runs with the study's seeds, of methods whose tuning is complete."""
        for seed in self.seeds:
            for task in self.tasks:
                for name in self.methods:
                    point = chosen_point(self.folder, task, METHODS[name])
                    if point is not None:
                        yield task, Run(task.name, task.setting, name, point, seed)

    def search_space(self) -> Iterator[tuple[Task, Run]]:
        """The points that the submission ships, on every task.

        The first, which is the one setting for all tasks, also with the study's seeds.
        """
        for task in self.tasks:
            points = search_space_points()
            for point in points:
                yield task, Run(task.name, task.setting, SEARCH_SPACE, point, TUNING_SEED)
            for seed in self.seeds:
                yield task, Run(task.name, task.setting, SEARCH_SPACE, points[0], seed)

    def ablation(self) -> Iterator[tuple[Task, Run]]:
        """The bases of the ablation and their changes, with the study's seeds."""
        for seed in self.seeds:
            for task in self.tasks:
                bases = ablation.base_points(
                    lambda method, task=task: chosen_point(  # type: ignore[misc]
                        self.folder, task, method
                    )
                )
                for name, base in bases.items():
                    for change in ablation.changes(name, base):
                        if change.point.get("fisher_type") == "type-2" and not task.exact_fisher:
                            continue
                        yield task, Run(task.name, task.setting, ablation.NAME, change.point, seed)


def search_space_points() -> list[Point]:
    """The points of tuning_search_space.json as it is now."""
    found: list[Point] = json.loads((results.ROOT / "tuning_search_space.json").read_text("utf-8"))
    return found


def chosen_point(folder: Path, task: Task, method: Method) -> Point | None:
    """The point with the best metric in tuning; None while tuning is not complete."""
    found: list[Log] = []
    for point in method.points:
        path = Run(task.name, task.setting, method.name, point, TUNING_SEED).path(folder)
        if not path.exists():
            return None
        found.append(logs.read(path))
    return best_of(found).run.point


def best_of(tuning: Iterable[Log]) -> Log:
    """The log with the best metric; of equal ones the first."""
    return max(tuning, key=lambda log: log.score)


def missing(folder: Path, runs: Iterable[tuple[Task, Run]]) -> list[tuple[Task, Run]]:
    """The runs without a log, each once."""
    left = {run.path(folder): (task, run) for task, run in runs}
    return [pair for path, pair in left.items() if not path.exists()]


def do(folder: Path, task: Task, run: Run, build: Method | None = None) -> Log | None:
    """Does a run and writes its log; None if another process has it.

    Raises:
        QuickstartError: the folder cannot be written, or a package is missing.
    """
    method = build or METHODS.get(run.method, ablation.METHOD)
    with logs.claimed(run.path(folder)) as mine:
        if not mine:
            return None
        outcome = train(task, method, run.point, run.seed)
        log = Log(run, task.metric, task.higher_is_better, outcome, logs.context())
        logs.write(folder, log)
        return log


def do_all(
    folder: Path, runs: Iterable[tuple[Task, Run]], tell: Callable[[int, int, Log], None]
) -> None:
    """Does all runs that are missing; `tell` gets the number done, their number, and the log."""
    left = missing(folder, runs)
    for number, (task, run) in enumerate(left, 1):
        log = do(folder, task, run)
        if log is not None:
            tell(number, len(left), log)


def same_point(a: Point, b: Point) -> bool:
    """Whether two points are equal."""
    return point_key(a) == point_key(b)
