"""docs/optimizers.md, its tables and picture, from the logs of a study, packed beside them.

    python -m experiments.optimizers.page [--folder DIR] [--docs DIR]

The text that judges the figures is experiments/optimizers/findings.md; all else comes from logs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments import results
from experiments.optimizers import ablation, report
from experiments.optimizers.draw import curves
from experiments.optimizers.logs import Log, pack, read_all
from experiments.optimizers.methods import METHODS, POINTS, WARMUP_FRACTION
from experiments.optimizers.study import TUNING_SEED
from experiments.optimizers.summary import TaskLogs, group
from quickstart.errors import QuickstartError, run_reporting_errors, writing

FINDINGS = Path(__file__).with_name("findings.md")
PICTURE = Path("pictures") / "optimizers.png"
ARCHIVE = Path("data") / "optimizers.jsonl.gz"  # the logs, see `--continue` of the command


def page(tasks: Sequence[TaskLogs], folder: Path, picture: bool) -> str:
    """The page as Markdown: the findings around one table and a picture."""
    above, below = FINDINGS.read_text(encoding="utf-8").split("<!-- the table -->")
    parts = [f"# Optimizers: what matters, and against whom\n\n{above.strip()}\n"]
    parts += [table.to_markdown() for table in report.overview(tasks, folder)]
    if picture:
        parts.append(f"![the metric over steps]({PICTURE.as_posix()})\n")
    parts.append(below.strip() + "\n")
    parts.append(
        "**To repeat it**: `./run.sh experiments optimizers` writes the logs that these pages are "
        f"made from, and with `--continue` goes on from those of today (`docs/{ARCHIVE.as_posix()}`"
        "); `python -m experiments.optimizers.page` makes the pages.\n"
    )
    return "\n".join(parts)


def tables_page(tasks: Sequence[TaskLogs], found: Sequence[Log], folder: Path) -> str:
    """All tables as Markdown, and how they came about."""
    parts = ["# The study of optimizers: all tables\n", how(tasks, found)]
    parts += [f"{table.to_markdown()}" for table in report.tables(tasks, folder)]
    parts.append(f"<sub>{provenance(found)}</sub>\n")
    return "\n".join(parts)


def how(tasks: Sequence[TaskLogs], found: Sequence[Log]) -> str:
    """How the figures came about: budgets, seeds, what is missing."""
    lines = [
        "What they say: [optimizers.md](optimizers.md). "
        f"Every method was tuned with {POINTS} points, one run each with seed {TUNING_SEED}; the "
        "point with the best metric then ran with other seeds, and figures are mean ± standard "
        "error over those. All runs of a task have the same length, for each seed the same first "
        f"parameters and batches, a linear warm-up over {WARMUP_FRACTION:.0%} of the steps and a "
        "linear decay to zero. *best in budget* is the best evaluation of a run. A target is the "
        "best metric of the worst seed of the tuned reference, so that all its seeds reach it; a "
        "run reaches it at its first evaluation that is as good. Seconds are those of training "
        "without evaluations, on a machine that did other work too; *time per step* comes from "
        "steps of all methods in turns. Targets come from the same runs as the reference's "
        "steps.\n",
    ]
    for task in tasks:
        missing = [m.label for name, m in METHODS.items() if name not in task.seeds]
        seeds = sorted({log.run.seed for runs in task.seeds.values() for log in runs})
        text = (
            f"- {task.name}: {task.setting['data']}; seeds {', '.join(map(str, seeds)) or 'none'}"
        )
        lines.append(text + (f"; not run: {', '.join(missing)}." if missing else "."))
    ended = [log for log in found if log.outcome.problem]
    lines.append(f"\n{len(found)} runs, of which {len(ended)} ended early because they diverged.\n")
    return "\n".join(lines)


def provenance(found: Sequence[Log]) -> str:
    """Dates, machines and versions of all logs."""
    days = sorted({str(log.context["date"])[:10] for log in found})
    machines = sorted({str(log.context["machine"]["cpu"]) for log in found})
    versions = Counter(
        f"{name} {version}"
        for log in found
        for name, version in log.context["versions"].items()
        if name in ("torch", "pytorch_optimizer") or (
            name == "submission" and log.run.method in (*report.OURS, ablation.NAME)
        )
    )  # fmt: skip
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"{when}; {', '.join(machines)}; "
        + ", ".join(f"{text} ({number} runs)" for text, number in sorted(versions.items()))
        + "; 'submission' is a checksum of the source that K-FAC's runs used."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.optimizers.page", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    default = results.DEFAULT_FOLDER / "optimizers" / "runs"
    parser.add_argument("--folder", type=Path, default=default, help="of the logs")
    parser.add_argument("--docs", type=Path, default=results.ROOT / "docs")
    options = parser.parse_args(arguments)
    found = read_all(options.folder)
    if not found:
        raise QuickstartError(
            f"no logs in {options.folder}: run `./run.sh experiments optimizers` first"
        )
    tasks = group(found)
    picture = curves(tasks, options.docs / PICTURE)
    for name, text in (
        ("optimizers_tables.md", tables_page(tasks, found, options.folder)),
        ("optimizers.md", page(tasks, options.folder, picture)),
    ):
        path = options.docs / name
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    pack(options.folder, options.docs / ARCHIVE)
    print(path)
    return 0


if __name__ == "__main__":
    run_reporting_errors(main)
