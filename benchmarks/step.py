"""`step`: one training step with everything renewed in it, against a step of plain SGD."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.floor import Work, count_work
from benchmarks.models import BATCH_SIZES, TITLES, make_case
from benchmarks.report import make_table, progress_bar, ratio_text
from benchmarks.rows import NOTES, SGD, Row, failure_lines, make_steps
from benchmarks.timing import Gemm, Race, Spread, Step, race

GEMM = "gemm"


def measure_step(
    model: str,
    batch_size: int,
    rows: list[Row],
    repeats: int,
    device: torch.device,
    console: Console,
    size: str = "full",
) -> dict[str, Any]:
    """Races the rows on one network; returns what the table and the JSON file need."""
    steps, failures = make_steps(rows, model, batch_size, device, size)
    gemm = Gemm(device, side=1536 if size == "full" else 64)
    everything: dict[str, Step] = {SGD.key: steps.pop(SGD.key), GEMM: gemm, **steps}
    with progress_bar(console, f"{model} {batch_size}", len(everything) * (repeats + 1)) as tick:
        result = race(everything, repeats, device, tick)
    failures |= result.failures
    if SGD.key in failures:
        raise RuntimeError(f"the SGD step of {model} failed: {failures[SGD.key]}")
    case = make_case(model, batch_size, device, size)
    floors = {approx: count_work(case, approx) for approx in ("expand", "reduce")}
    peak = gemm.peak(result.samples[GEMM])
    sgd = Spread.of([sample.wall for sample in result.samples[SGD.key]]).median
    return {
        "model": model,
        "title": TITLES[model],
        "batch_size": batch_size,
        "factors_only": case.factors_only,
        "rows": {row.key: _figures(result, row.key) for row in rows if row.key not in failures},
        "failures": failures,
        "gemm_peak": {"wall": peak.wall, "cpu": peak.cpu},
        "sgd_share_of_peak": floors["expand"].sgd / peak.wall / sgd,
        "floor": {
            approx: _floor(work, case.factors_only, peak.wall) for approx, work in floors.items()
        },
    }


def _figures(result: Race, key: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        figures[f"{clock}_seconds"] = asdict(result.seconds(key, clock))
        figures[f"{clock}_ratio"] = asdict(result.ratio(key, SGD.key, clock))
    return figures


def _floor(work: Work, factors_only: bool, peak: float) -> dict[str, float]:
    total = work.factors_only if factors_only else work.step
    return {
        "ratio": total / work.sgd,
        "seconds_at_peak": total / peak,
        **{f"gflop_{name}": value / 1e9 for name, value in asdict(work).items()},
    }


def step_table(result: dict[str, Any], rows: list[Row]) -> Table:
    """One network's table."""
    what = "factors only, no SGD step in it" if result["factors_only"] else "whole step"
    table = make_table(
        f"{result['title']}, batch {result['batch_size']}: {what}",
        ["method", "CPU / SGD", "wall / SGD", "CPU s", "wall s"],
        _caption(result, rows),
    )
    for row in rows:
        if row.key in result["failures"]:
            table.add_row(row.title, "cannot run", "", "", "")
            continue
        figures = result["rows"][row.key]
        cells = [ratio_text(Spread(**figures[f"{clock}_ratio"])) for clock in ("cpu", "wall")]
        cells += [f"{figures[f'{clock}_seconds']['median']:.3f}" for clock in ("cpu", "wall")]
        table.add_row(row.title, *cells)
    for approx, floor in result["floor"].items():
        seconds = f"{floor['seconds_at_peak']:.3f}"
        table.add_row(f"floor {approx}", f"{floor['ratio']:.2f}", "", "", seconds)
    return table


def _caption(result: dict[str, Any], rows: list[Row]) -> str:
    lines = [
        f"medians (quartiles) over rounds; {NOTES}",
        "floor: operations of all matrix products, and their time at the peak rate of "
        f"{result['gemm_peak']['wall'] / 1e9:.0f} GFLOP/s, of which SGD reaches "
        f"{result['sgd_share_of_peak']:.0%}",
        *failure_lines(rows, result["failures"]),
    ]
    return "\n".join(lines)


def step_figure(results: list[dict[str, Any]]) -> Any:
    """Bars of CPU-time ratios, one panel per network, with the floors as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(results)))
    for index, result in enumerate(results):
        axes = figure.add_subplot(len(results), 1, index + 1)
        keys = [key for key in result["rows"] if key != SGD.key]
        medians = [result["rows"][key]["cpu_ratio"]["median"] for key in keys]
        lows = [result["rows"][key]["cpu_ratio"]["low"] for key in keys]
        highs = [result["rows"][key]["cpu_ratio"]["high"] for key in keys]
        errors = [
            [m - low for m, low in zip(medians, lows, strict=True)],
            [high - m for m, high in zip(medians, highs, strict=True)],
        ]
        colours = ["tab:orange" if key.startswith("ours") else "tab:gray" for key in keys]
        axes.barh(keys, medians, xerr=errors, color=colours)
        axes.invert_yaxis()
        for style, approx in ((":", "expand"), ("--", "reduce")):
            axes.axvline(
                result["floor"][approx]["ratio"], color="k", ls=style, label=f"floor {approx}"
            )
        axes.axvline(1, color="tab:blue", label="SGD")
        axes.set_title(f"{result['title']}, batch {result['batch_size']}", fontsize=9)
        axes.legend(fontsize=7)
    axes.set_xlabel("CPU time of a step / SGD step")
    figure.tight_layout()
    return figure


def batch_sizes(model: str, override: list[int] | None) -> tuple[int, ...]:
    """The network's usual batch sizes, or those that are given."""
    return tuple(override) if override else BATCH_SIZES[model]
