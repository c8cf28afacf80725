"""Where results go: tables on the terminal, JSON files and plots in a folder."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import peers
from benchmarks.timing import Spread


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {peer: peers.peer_version(peer) for peer in peers.PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save_json(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes folder/name.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def save_figure(folder: Path, name: str, figure: Any) -> Path:
    """Writes folder/name.png, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    partial = folder / f"{name}.partial.png"
    figure.savefig(partial, dpi=150, bbox_inches="tight")
    os.replace(partial, path)
    return path


def ratio_text(spread: Spread) -> str:
    """Median and quartiles."""
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def make_table(title: str, columns: list[str], caption: str | None = None) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Any]:
    """A bar; yields a function that tells it what comes next."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[what]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, what="")
        started = False

        def advance(what: str) -> None:
            nonlocal started
            progress.update(task, advance=int(started), what=what)
            started = True

        yield advance
