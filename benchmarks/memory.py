"""`memory`: peak memory of a step above the loaded model.

Every row runs in a process of its own. On a CPU the figure is the growth of the process's largest
resident set (Linux' `VmHWM`) over `STEPS` steps, counted from when network and batch are in
memory; the C library is told to return every freed block of 64 KiB or more at once, so that the
resident set follows what is in use. Libraries' own scratch space is part of it, for SGD as for
all others. On a GPU it is `torch.cuda.max_memory_allocated`, counted from the same moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.models import TITLES
from benchmarks.report import make_table
from benchmarks.rows import NOTES, SGD, Row, failure_lines
from benchmarks.timing import Step, first_line

STEPS = 3
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}


def peak_of_steps(step: Step, device: torch.device) -> float:
    """MiB by which `STEPS` steps raise the peak above what is in memory now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
    else:
        before = _largest_resident_set(reset=True)
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        after = float(torch.cuda.max_memory_allocated(device))
    else:
        after = _largest_resident_set()
    return (after - before) / 2**20


def _largest_resident_set(*, reset: bool = False) -> float:
    """Bytes, since the process began or this was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * float(status.partition("VmHWM:")[2].split()[0])


def print_probe(make: Callable[[], Step], device: torch.device) -> None:
    """Measures in this process and prints a line of JSON; what a child process does."""
    try:
        result: dict[str, Any] = {"mib": peak_of_steps(make(), device)}
    except Exception as error:  # whatever a peer raises is its row's text
        result = {"failure": first_line(error)}
    print(json.dumps(result))


def probe(
    row: str, model: str, batch_size: int, device: torch.device, size: str, *options: str
) -> dict[str, Any]:
    """{"mib": ...} or {"failure": ...}, measured in a fresh process.

    Args:
        row: its key; other arguments as those of the command line.
    """
    command = [
        sys.executable, "-m", "benchmarks", "probe", row, model, str(batch_size),
        "--device", str(device), "--threads", str(torch.get_num_threads()), "--size", size,
        *options,
    ]  # fmt: skip
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        told = done.stderr.strip().splitlines() or ["it printed nothing"]
        return {"failure": f"exit code {done.returncode}: {told[-1]}"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def measure_memory(
    model: str, batch_size: int, rows: list[Row], device: torch.device, size: str
) -> dict[str, Any]:
    """Peaks of all rows on one network."""
    return {
        "model": model,
        "title": TITLES[model],
        "batch_size": batch_size,
        "rows": {row.key: probe(row.key, model, batch_size, device, size) for row in rows},
    }


def memory_table(result: dict[str, Any], rows: list[Row]) -> Table:
    """One network's table."""
    failures = {
        key: found["failure"] for key, found in result["rows"].items() if "failure" in found
    }
    table = make_table(
        f"{result['title']}, batch {result['batch_size']}: peak memory above the loaded model",
        ["method", "MiB", "MiB above SGD"],
        "\n".join(
            [f"{STEPS} steps in a process of its own; {NOTES}", *failure_lines(rows, failures)]
        ),
    )
    base = result["rows"][SGD.key].get("mib")
    for row in rows:
        found = result["rows"][row.key]
        if "failure" in found:
            table.add_row(row.title, "cannot run", "")
            continue
        above = "" if base is None or row == SGD else f"{found['mib'] - base:.0f}"
        table.add_row(row.title, f"{found['mib']:.0f}", above)
    return table


def memory_figure(results: list[dict[str, Any]]) -> Any:
    """Bars of peaks, one panel per network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(results)))
    for index, result in enumerate(results):
        axes = figure.add_subplot(len(results), 1, index + 1)
        peaks = {key: found["mib"] for key, found in result["rows"].items() if "mib" in found}
        colours = ["tab:orange" if key.startswith("ours") else "tab:gray" for key in peaks]
        axes.barh(list(peaks), list(peaks.values()), color=colours)
        axes.invert_yaxis()
        axes.set_title(f"{result['title']}, batch {result['batch_size']}", fontsize=9)
        axes.set_xlabel("peak memory above the loaded model, MiB")
    figure.tight_layout()
    return figure
