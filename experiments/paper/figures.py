"""Figures 3, 4 and 5 as AlgoPerf runs: which there are, and the command of each."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import results
from steps_to_target.paper import PAPER_ROWS, PaperRow

SETTINGS = Path("workloads_overrides", "paper")  # below the project's folder
METHODS = ("reference", "kfac_expand", "kfac_reduce")
SEARCHED = ("search_expand", "search_reduce")
SEARCH_TRIALS = 15
FIRST_SEED = 1


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    Attributes:
        name: of the experiment, and of the folder of its settings.
        number: in the paper.
        workload: of AlgoPerf.
        data: what AlgoPerf reads, below the folder of its set-up script.
        gpus: of a run, V100 with 32 GB.
        seeds: with which each method is repeated.
        searched: whether the paper tuned K-FAC for it.
    """

    name: str
    number: int
    workload: str
    data: str
    gpus: int
    seeds: int
    searched: bool = True

    @property
    def every_step(self) -> bool:
        """Whether it is Figure 5."""
        return not self.searched

    def experiment_name(self, method: str) -> str:
        """AlgoPerf's name of a method's runs; the comparer tells the figures apart by it."""
        return f"{method}_every_step" if self.every_step else method

    def row(self, method: str) -> PaperRow:
        """What the paper reports of a method, or of what it searched for."""
        kind = method.partition("_")[2] or method
        rows = PAPER_ROWS[self.workload]
        return next(r for r in rows if (r.kind, r.every_step) == (kind, self.every_step))


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("ogbg", 3, "ogbg", "ogbg", gpus=1, seeds=5),
        Figure("imagenet_vit", 4, "imagenet_vit", "imagenet/pytorch", gpus=4, seeds=3),
        Figure(
            "every_step", 5, "imagenet_vit", "imagenet/pytorch", gpus=4, seeds=1, searched=False
        ),
    )
}


@dataclass(frozen=True)
class Extra:
    """Arguments of the user's own.

    Attributes:
        launcher: options of `./run.sh algoperf`, before its `--`.
        runner: flags of AlgoPerf's submission runner, behind it.
    """

    launcher: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()

    @classmethod
    def split(cls, arguments: Sequence[str]) -> Extra:
        """Arguments as `./run.sh algoperf` takes them; without a `--` all are the launcher's."""
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        return cls(tuple(arguments[:cut]), tuple(arguments[cut + 1 :]))


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: for people, and of its folder below the figure's runs.
        method: file of its settings.
        arguments: of `./run.sh algoperf`.
        trial: AlgoPerf's number of it.
    """

    name: str
    method: str
    arguments: tuple[str, ...]
    trial: int = 1

    def command(self, gpus: int) -> str:
        """As it is typed into a shell, in the project's folder."""
        return f"NPROC={gpus} {shlex.join(['./run.sh', 'algoperf', *self.arguments])}"


def arguments(
    figure: Figure, method: str, name: str, data_dir: Path, runs: Path, extra: Extra
) -> list[str]:
    """Of `./run.sh algoperf`, for one method; which seed and trial is left open.

    Args:
        name: AlgoPerf's of the experiment, a folder below `runs`.
    """
    return [
        "--paper-budget",
        *extra.launcher,
        "--",
        f"--workload={figure.workload}",
        f"--data_dir={data_dir}",
        f"--tuning_search_space={SETTINGS / figure.name / f'{method}.json'}",
        f"--experiment_dir={runs}",
        f"--experiment_name={name}",
        *extra.runner,
    ]


def plan(
    figure: Figure, seeds: int, search: bool, data_dir: Path, runs: Path, extra: Extra
) -> Iterator[Run]:
    """All runs, in order: the first seed of every method, then the second; or the search."""
    if search:
        for method in SEARCHED:
            name = figure.experiment_name(method)
            common = arguments(figure, method, name, data_dir, runs, extra)
            for number in range(SEARCH_TRIALS):
                given = [
                    f"--num_tuning_trials={SEARCH_TRIALS}",
                    f"--hparam_start_index={number}",
                    f"--hparam_end_index={number + 1}",
                    f"--rng_seed={FIRST_SEED}",
                ]
                yield Run(name, method, (*common, *given), number + 1)
        return
    for seed in range(seeds):
        for method in METHODS:
            name = f"{figure.experiment_name(method)}/study_{seed}"
            common = arguments(figure, method, name, data_dir, runs, extra)
            yield Run(name, method, (*common, f"--rng_seed={FIRST_SEED + seed}"))


def hours_in_all(figure: Figure, runs: Sequence[Run]) -> float:
    """What the runs took the paper, one after the other."""
    return math.fsum(figure.row(run.method).hours for run in runs)


def shown_path(path: Path) -> Path:
    """A path as short as it can be said in the project's folder."""
    path = path.expanduser().absolute()
    return path.relative_to(results.ROOT) if path.is_relative_to(results.ROOT) else path
