"""docs/results.md: what the experiments gave, where and when, beside what the paper says."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments import results
from experiments.registry import Experiment
from quickstart.errors import writing

DEFAULT_DOCS = results.ROOT / "docs"

_HEAD = """# Results

Every table and figure of the paper (Eschenhagen et al., NeurIPS 2023, arXiv 2311.00636), run again
by `./run.sh experiments all --small`, which wrote this page. These runs are small; the commands for
the paper's sizes are below each. Times compare only within one machine.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of commands that write the page."""
    parser.add_argument("--docs", type=Path, default=DEFAULT_DOCS,
                        help="where results.md and pictures/ go (default: docs)")  # fmt: skip


def write(folder: Path, experiments: Iterable[Experiment], docs: Path) -> Path:
    """Writes the page and copies the pictures.

    Args:
        folder: of the results.
        experiments: those that have one.
        docs: where the page goes.

    Raises:
        QuickstartError: a result is missing or damaged, or the page cannot be written.
    """
    parts = [_HEAD]
    for experiment in experiments:
        content = results.read(folder, experiment.name)
        picture = folder / experiment.name / "picture.png"
        shown = picture.exists()
        if shown:
            with writing(docs / "pictures" / f"{experiment.name}.png") as temporary:
                shutil.copyfile(picture, temporary)
        parts.append(section(experiment, content, shown))
    path = docs / "results.md"
    with writing(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return path


def section(experiment: Experiment, content: dict[str, Any], picture: bool) -> str:
    """The part of the page about one experiment."""
    module = experiment.load()
    tables = "\n".join(table.to_markdown() for table in module.tables(content["result"]))
    image = f"![{experiment.shows}](pictures/{experiment.name}.png)\n\n" if picture else ""
    return (
        f"## {experiment.name} ({experiment.paper})\n\n{experiment.shows[:1].upper()}"
        f"{experiment.shows[1:]}.\n\n{tables}\n{image}{module.PAPER.strip()}\n\n"
        f"<sub>{provenance(content)}</sub>\n"
    )


def provenance(content: dict[str, Any]) -> str:
    """One line: machine, date, versions and settings."""
    machine = content["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in content["settings"].items())
    return (
        f"{content['date'][:10]}, {content['seconds']:.0f} s on {machine['cpu']} "
        f"({machine['cpu_count']} cores, {threads}, {gpus}); {versions}; "
        f"settings: {settings or 'none'}."
    )
