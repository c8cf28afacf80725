"""`sweep`: time and memory over batch sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory import probe
from benchmarks.models import TITLES
from benchmarks.report import make_table, progress_bar
from benchmarks.rows import Row, make_steps
from benchmarks.timing import race


def measure_sweep(
    model: str,
    batch_sizes: list[int],
    rows: list[Row],
    repeats: int,
    device: torch.device,
    console: Console,
    size: str = "full",
) -> dict[str, Any]:
    """CPU seconds (wall seconds on a GPU) and MiB of every row at every batch size."""
    clock = "wall" if device.type == "cuda" else "cpu"
    seconds: dict[str, list[float | None]] = {row.key: [] for row in rows}
    memory: dict[str, list[float | None]] = {row.key: [] for row in rows}
    failures: dict[str, str] = {}
    for batch_size in batch_sizes:
        steps, missing = make_steps(rows, model, batch_size, device, size)
        total = len(steps) * (repeats + 1)
        with progress_bar(console, f"{model} {batch_size}", total) as tick:
            result = race(steps, repeats, device, tick)
        failures |= missing | result.failures
        del steps
        for row in rows:
            ran = row.key in result.samples
            seconds[row.key].append(result.seconds(row.key, clock).median if ran else None)
            found = probe(row.key, model, batch_size, device, size) if ran else {}
            memory[row.key].append(found.get("mib"))
    return {
        "model": model,
        "title": TITLES[model],
        "clock": clock,
        "batch_sizes": batch_sizes,
        "seconds": seconds,
        "mib": memory,
        "failures": failures,
    }


def slope(batch_sizes: list[int], values: list[float | None]) -> float | None:
    """Exponent p of value ∝ batch size^p, by least squares in log-log; None for under 2 values."""
    pairs = [(n, v) for n, v in zip(batch_sizes, values, strict=True) if v is not None and v > 0]
    if len({n for n, _ in pairs}) < 2:
        return None
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def sweep_table(result: dict[str, Any]) -> Table:
    """Rows: methods, once for time and once for memory; columns: batch sizes and the slope."""
    sizes = result["batch_sizes"]
    table = make_table(
        f"{result['title']}: {result['clock']} seconds and peak MiB of one step",
        ["", *map(str, sizes), "slope"],
        "slope: exponent of the batch size, least squares in log-log",
    )
    for quantity, digits, text in (("seconds", 3, "s"), ("mib", 0, "MiB")):
        for key, values in result[quantity].items():
            cells = ["-" if v is None else f"{v:.{digits}f}" for v in values]
            exponent = slope(sizes, values)
            table.add_row(f"{key}, {text}", *cells, "-" if exponent is None else f"{exponent:.2f}")
    return table


def sweep_figure(results: list[dict[str, Any]]) -> Any:
    """Log-log lines: time on the left, memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6 * len(results)))
    for index, result in enumerate(results):
        for side, (quantity, label) in enumerate(
            (("seconds", f"{result['clock']} seconds of a step"), ("mib", "peak MiB above model"))
        ):
            axes = figure.add_subplot(len(results), 2, 2 * index + side + 1)
            for key, values in result[quantity].items():
                axes.loglog(result["batch_sizes"], values, "o-", label=key)
            axes.set_xlabel("batch size")
            axes.set_ylabel(label)
            axes.set_title(result["title"], fontsize=9)
            axes.legend(fontsize=7)
    figure.tight_layout()
    return figure
