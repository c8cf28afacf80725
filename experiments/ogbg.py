"""Figure 3: steps and time to a target of a GraphNetwork on molecules, against Nesterov.

The paper's experiment is AlgoPerf's ogbg on a V100: --paper. This is its scaled version: the
quickstart's GraphNetwork on 35,633 real molecules, with tuned Nesterov and K-FAC-expand and
K-FAC-reduce in front of it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import target_runs
from experiments.paper.figures import FIGURES
from experiments.tables import Table
from experiments.target_runs import add_flags, draw

SMALL: list[str] = []
PAPER_SIZE = None  # a figure of `paper.figures`
PAPER = """
The paper's rows are of AlgoPerf's ogbg: steps and hours to a validation mean average precision of
0.28098 on ogbg-molpcba, five seeds, one V100 32 GB. Its runs, with its own settings
([to the digit](../workloads_overrides/paper/README.md)), resumable, here or on a Slurm cluster, and
the comparison with these rows at the end (not run here):

```sh
./run.sh experiments ogbg --paper --data-dir DATA/ogbg    # --dry-run prints the 15 commands
```
"""

__all__ = ["PAPER", "PAPER_SIZE", "SMALL", "add_flags", "draw", "run", "tables"]

FIGURE = FIGURES["ogbg"]
METHODS = ("nesterov", "kfac_expand_nesterov", "kfac_reduce_nesterov")
# Levels that Nesterov reaches; the quickstart's own, for its best rule, are above them.
VALIDATION_TARGET, TEST_TARGET = 0.575, 0.58


def tables(result: dict[str, Any]) -> list[Table]:
    """Ours, and the paper's."""
    return target_runs.tables(result, FIGURE)


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Nine runs, or as many seeds as asked for."""
    contest = replace(
        target_runs.of_study("molecules", METHODS),
        validation_target=VALIDATION_TARGET,
        test_target=TEST_TARGET,
    )
    return target_runs.run(contest, options, folder, console)
