"""The study's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.optimizers import ablation, timing
from experiments.optimizers.logs import Log
from experiments.optimizers.methods import METHODS, Point, point_key
from experiments.optimizers.summary import (
    TaskLogs,
    Uncertain,
    best_values,
    carried_over,
    mean_ratio,
    product,
    reached,
    target_of,
)
from experiments.tables import Table, mean_and_error, plus_minus

REFERENCE = "nadamw"
RIVAL = "soap"
BEST, ONE_SETTING = "kfac_reduce_polar", "one_setting"
SEARCHED_REFERENCES = ("nesterov", "nadamw", "soap")
OURS = tuple(name for name in METHODS if name.startswith("kfac_"))


def tables(tasks: Sequence[TaskLogs], folder: Path) -> list[Table]:
    """All tables, task by task, then how settings carry over."""
    found: list[Table] = []
    for task in tasks:
        seconds = timing.read(folder, task.task, task.setting)
        for reference in (REFERENCE, RIVAL):
            if reference in task.seeds:
                found.append(to_target(task, reference, seconds))
        found += [*tuning(task), *ablations(task)]
    found += searched(tasks)
    if len(tasks) > 1:
        found += carrying(tasks)
    return found


def overview(tasks: Sequence[TaskLogs], folder: Path) -> list[Table]:
    """Each method's steps, and time, to the level that the rival just reaches, and best metric."""
    shown = [task for task in tasks if RIVAL in task.seeds]
    runs = {task.name: {**task.seeds, ONE_SETTING: task.one_setting} for task in shown}
    names = list(dict.fromkeys(name for task in shown for name in task.seeds))
    labels = {name: METHODS[name].label for name in names}
    if all(task.one_setting for task in shown):
        labels[ONE_SETTING] = f"{METHODS[BEST].label}, one setting for all"
    steps = {task.name: _steps_of(task, runs[task.name]) for task in shown}
    per_step = {
        task.name: _per_step(timing.read(folder, task.task, task.setting), RIVAL) for task in shown
    }
    for times in per_step.values():
        if BEST in times:
            times[ONE_SETTING] = times[BEST]
    label = METHODS[RIVAL].label

    def table(what: str, columns: list[str], cell: Callable[[TaskLogs, str], str]) -> Table:
        rows = [(text, *(cell(task, name) for task in shown)) for name, text in labels.items()]
        return Table(what, ("method", *columns), tuple(r for r in rows if {*r[1:]} != {"-"}))

    def steps_cell(task: TaskLogs, name: str) -> str:
        return _text(steps[task.name].get(name))

    def time_cell(task: TaskLogs, name: str) -> str:
        return _text(product(steps[task.name].get(name), per_step[task.name].get(name)))

    def best_cell(task: TaskLogs, name: str) -> str:
        values = best_values(runs[task.name].get(name, ()))
        return plus_minus(values) if values else "-"

    plain = [task.name for task in shown]
    level = f"to the level that the worst seed of tuned {label} just reaches"
    return (
        [
            table(
                f"steps {level}, as multiples of {label}'s; others do not reach it",
                plain,
                steps_cell,
            ),
            table(f"time {level}: these steps times the time per step", plain, time_cell),
            table("best in budget", [f"{t.name}: {t.metric}" for t in shown], best_cell),
        ]
        if names
        else []
    )


def _steps_of(task: TaskLogs, runs: Mapping[str, Sequence[Log]]) -> dict[str, Uncertain]:
    """Method -> its steps to the rival's level, as multiples of the rival's, if all seeds did."""
    target = target_of(task.seeds[RIVAL])
    if target is None:
        return {}
    rival = reached(task.seeds[RIVAL], target).steps
    own = {name: reached(logs, target) for name, logs in runs.items()}
    return {name: mean_ratio(r.steps, rival) for name, r in own.items() if r.steps and r.all_did}


def title(task: TaskLogs) -> str:
    """Names the task, its data and its budget."""
    s = task.setting
    return f"{task.task} ({s['data']}; {s['steps']} steps, batch {s['batch_size']})"


def to_target(task: TaskLogs, reference: str, seconds: Mapping[str, Sequence[float]]) -> Table:
    """Steps and seconds of every method to what the reference's worst seed reaches."""
    target = target_of(task.seeds[reference])
    label = METHODS[reference].label
    sign = ">=" if task.higher_is_better else "<="
    header = (
        "method", "best in budget", "reached", "steps", f"steps / {label}", "seconds",
        f"seconds / {label}", f"time per step / {label}",
    )  # fmt: skip
    if target is None:
        return Table(f"{title(task)}: a seed of {label} gave no finite metric", header, ())
    base = reached(task.seeds[reference], target)
    per_step = _per_step(seconds, reference)
    rows = []
    for name, runs in task.seeds.items():
        own = reached(runs, target)
        cells = ["-"] * 4
        if own.all_did:
            cells = [plus_minus(own.steps, 0), _ratio(own.steps, base.steps),
                     plus_minus(own.seconds, 1), _ratio(own.seconds, base.seconds)]  # fmt: skip
        rows.append(
            (METHODS[name].label, plus_minus(best_values(runs)) if best_values(runs) else "-",
             f"{len(own.steps)}/{own.runs}", *cells, _text(per_step.get(name)))
        )  # fmt: skip
    what = f"{task.metric} {sign} {target:.3f}, which the worst seed of tuned {label} just reaches"
    return Table(f"{title(task)}: {what}", header, tuple(rows))


def tuning(task: TaskLogs) -> list[Table]:
    """Every point of every method, and the best metric of its run."""
    rows = []
    for name, tried in task.tuning.items():
        chosen = task.chosen(name)
        for log in tried:
            mark = " (chosen)" if log is chosen else ""
            value = "-" if log.best is None else f"{log.best:.3f}"
            ended = " (ended early)" if log.outcome.problem else ""
            rows.append((METHODS[name].label, shown(log.run.point, tried) + mark, value + ended))
    if not rows:
        return []
    return [Table(f"{title(task)}: tuning, one run a point", ("method", "point", task.metric),
                  tuple(rows))]  # fmt: skip


def shown(point: Point, among: Sequence[Log]) -> str:
    """The parts of a point in which the points of its method differ."""
    varied = [
        name
        for name in point
        if len({point_key({"": log.run.point.get(name)}) for log in among}) > 1
    ]
    return ", ".join(f"{name} {point[name]}" for name in varied)


def ablations(task: TaskLogs) -> list[Table]:
    """Each change of each base, its best metric and its steps to the reference's target."""
    target = target_of(task.seeds[REFERENCE]) if REFERENCE in task.seeds else None
    goal = f"steps to {METHODS[REFERENCE].label}'s target"
    header = ("changed", "to", "seeds", task.metric, goal, "seconds per step")
    found = []
    for method in ablation.CHANGES:
        if method not in task.tuning:
            continue
        base = task.chosen(method).run.point
        rows = [
            (change.what, change.value, *_changed(runs, target))
            for change in ablation.changes(method, base)
            if (runs := task.ablation.get(point_key(change.point), ()))
        ]
        values = ablation.base_values(method, base)
        at = ", ".join(f"{what} {value}" for what, value in values.items())
        name = f"one setting of {METHODS[method].label} changed at a time; base: {at}"
        if rows:
            found.append(Table(f"{title(task)}: {name}", header, tuple(rows)))
    return found


def _changed(runs: Sequence[Log], target: float | None) -> tuple[str, str, str, str]:
    """Seeds, metric, steps to the target, seconds per step."""
    steps = "-"
    if target is not None:
        own = reached(runs, target)
        steps = plus_minus(own.steps, 0) if own.all_did else f"{len(own.steps)}/{own.runs}"
    values = best_values(runs)
    per_step = [
        log.outcome.seconds / log.outcome.evaluations[-1].step
        for log in runs
        if log.outcome.evaluations
    ]
    return (
        str(len(runs)),
        plus_minus(values) if values else "-",
        steps,
        plus_minus(per_step) if per_step else "-",
    )


def searched(tasks: Sequence[TaskLogs]) -> list[Table]:
    """The submission's search space against tuned references, tuning runs on both sides."""
    rows = []
    for task in tasks:
        for reference in SEARCHED_REFERENCES:
            if not task.search_space or reference not in task.tuning:
                continue
            chosen = task.chosen(reference)
            own = chosen.first_at(chosen.best) if chosen.best is not None else None
            if own is None:
                continue
            hits = [log.first_at(chosen.best) for log in task.search_space]  # type: ignore[arg-type]
            steps = [hit.step for hit in hits if hit is not None]
            fewest = f"{min(steps)} ({min(steps) / own.step:.2f})" if steps else "-"
            rows.append(
                (task.name, METHODS[reference].label, f"{chosen.best:.3f}", str(own.step), fewest,
                 f"{len(steps)}/{len(hits)}")
            )  # fmt: skip
    header = (
        "task", "reference, best of its eight points", "its best metric", "its steps",
        "steps of the best point of the space (ratio)", "points that reach it",
    )  # fmt: skip
    name = "The submission's search space on all tasks: steps to the references' best"
    return [Table(name, header, tuple(rows))] if rows else []


def carrying(tasks: Sequence[TaskLogs]) -> list[Table]:
    """Single settings on all tasks, from the tuning runs."""
    if not all(REFERENCE in task.tuning for task in tasks):
        return []
    header = ("setting", *(f"{task.name}: steps, metric behind best" for task in tasks))
    rows = []
    for found in carried_over(tasks, OURS)[:12]:
        cells = []
        for task in tasks:
            slow = found.slowdown[task.name]
            cells.append(
                ("-" if slow is None else f"{slow:.2f}") + f", {found.loss[task.name]:.3f}"
            )
        shown = ("learning_rate", "damping", "beta2", "factor_decay")
        text = ", ".join(f"{k} {found.point[k]}" for k in shown if k in found.point)
        rows.append((f"{METHODS[found.method].label}, {text}", *cells))
    name = "One setting for all tasks, tuning runs: steps to NAdamW's best over the fewest of ours"
    return [Table(name, header, tuple(rows))] if rows else []


def _ratio(a: Sequence[float], b: Sequence[float]) -> str:
    return _text(mean_ratio(a, b))


def _text(value: Uncertain | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.2f}" if value[1] != value[1] else f"{value[0]:.2f} ± {value[1]:.2f}"


def _per_step(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, Uncertain]:
    """Mean and standard error of the ratios of the rounds, in which all took turns."""
    if reference not in seconds:
        return {}
    return {
        name: mean_and_error([a / b for a, b in zip(own, seconds[reference], strict=True)])
        for name, own in seconds.items()
    }
