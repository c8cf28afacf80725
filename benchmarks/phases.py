"""`profile`: where the time of our own step goes."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

from benchmarks.methods import make_kfac, update_rule
from benchmarks.models import TITLES, Case, make_case
from benchmarks.report import make_table
from benchmarks.timing import Sample, Spread, measure

PHASES = ("forward", "fisher pass", "backward", "inverses", "precondition", "update")


class Stopwatch:
    """Adds up samples under names."""

    def __init__(self, device: torch.device) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self._device = device

    def time(self, name: str, step: Any) -> Any:
        """Runs a function, keeps its time, and returns its result."""
        result: list[Any] = []
        sample = measure(lambda: result.append(step()), self._device)
        self.samples.setdefault(name, []).append(sample)
        return result[0]


def measure_phases(
    model: str, batch_size: int, approx: str, repeats: int, device: torch.device, size: str = "full"
) -> dict[str, Any]:
    """Median seconds of every phase of our step, and of a plain step, taking turns."""
    ours, plain = Stopwatch(device), Stopwatch(device)
    run_ours = _our_phases(make_case(model, batch_size, device, size), approx, ours)
    run_plain = _plain_phases(make_case(model, batch_size, device, size), plain)
    for repeat in range(repeats + 1):
        run_plain()
        run_ours()
        if repeat == 0:
            ours.samples.clear()
            plain.samples.clear()
    return {
        "model": model,
        "title": TITLES[model],
        "batch_size": batch_size,
        "approx": approx,
        "ours": _medians(ours),
        "plain": _medians(plain),
    }


def _medians(watch: Stopwatch) -> dict[str, dict[str, float]]:
    return {
        name: {
            clock: Spread.of([getattr(sample, clock) for sample in samples]).median
            for clock in ("cpu", "wall")
        }
        for name, samples in watch.samples.items()
    }


def _our_phases(case: Case, approx: str, watch: Stopwatch) -> Any:
    kfac = make_kfac(case, approx, "mc")
    optimizer = update_rule(case, "nesterov")

    def forward() -> torch.Tensor:
        with kfac.record(case.sharing()):
            logits: torch.Tensor = case.model(case.inputs)
        return logits

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = watch.time("forward", forward)
        watch.time("fisher pass", lambda: kfac.update(logits, case.likelihood, mask=case.weights))
        watch.time("backward", lambda: torch.autograd.backward(case.loss(logits)))
        before = dict(kfac.seconds)
        watch.time("end of step", kfac.precondition)
        for name, key in (("inverses", "inverses"), ("precondition", "precondition")):
            seconds = kfac.seconds[key] - before[key]
            watch.samples.setdefault(name, []).append(Sample(float("nan"), seconds))
        watch.time("update", optimizer.step)

    return step


def _plain_phases(case: Case, watch: Stopwatch) -> Any:
    optimizer = update_rule(case, "nesterov")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = watch.time("forward", lambda: case.model(case.inputs))
        watch.time("backward", lambda: torch.autograd.backward(case.loss(logits)))
        watch.time("update", optimizer.step)

    return step


def phases_table(result: dict[str, Any]) -> Table:
    """Wall seconds of the phases, and their share of a plain step."""
    table = make_table(
        f"{result['title']}, batch {result['batch_size']}, {result['approx']}: phases of our step",
        ["phase", "ours, ms", "plain, ms", "ours / whole plain step"],
        "wall time; forward includes recording and A; fisher pass includes B; "
        "fisher pass and end of step use the graph that backward uses again",
    )
    plain_total = sum(result["plain"][name]["wall"] for name in ("forward", "backward", "update"))
    total = 0.0
    for name in PHASES:
        ours = result["ours"][name]["wall"]
        total += ours
        plain = result["plain"].get(name)
        plain_text = "" if plain is None else f"{1e3 * plain['wall']:.1f}"
        table.add_row(name, f"{1e3 * ours:.1f}", plain_text, f"{ours / plain_total:.2f}")
    table.add_row(
        "sum", f"{1e3 * total:.1f}", f"{1e3 * plain_total:.1f}", f"{total / plain_total:.2f}"
    )
    return table


def operator_table(
    model: str, batch_size: int, approx: str, device: torch.device, size: str, count: int
) -> str:
    """torch.profiler's table of the most expensive operators of one of our steps."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.methods import ours_step

    step = ours_step(make_case(model, batch_size, device, size), approx, "mc")
    step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages: Any = profiler.key_averages(group_by_input_shape=True)
    table: str = averages.table(sort_by=key, row_limit=count, max_name_column_width=40)
    return table


def phases_figure(results: list[dict[str, Any]]) -> Any:
    """Stacked bars of the phases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.5 * len(results)))
    axes = figure.add_subplot()
    labels = [f"{r['model']} {r['batch_size']} {r['approx']}" for r in results]
    left = [0.0] * len(results)
    for name in PHASES:
        widths = [1e3 * result["ours"][name]["wall"] for result in results]
        axes.barh(labels, widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("wall time of our step, ms")
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    return figure
