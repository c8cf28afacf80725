"""Figure 4: steps and time to a target of a ViT on images, against NAdamW.

The paper's experiment is AlgoPerf's imagenet_vit on V100s: --paper. This is its scaled version: the
quickstart's small ViT on scikit-learn's handwritten digits, or on CIFAR-10 with --data-dir, with
NAdamW and K-FAC-expand and K-FAC-reduce in front of it.
"""

from __future__ import annotations

import argparse
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
Here every method was tuned with three learning rates and a seed of its own
([what was tried](../experiments/settings/images_tuning.json)). The paper's rows are of AlgoPerf's
imagenet_vit: steps and hours to a validation accuracy of 0.77309 on ImageNet, three seeds, four
V100 32 GB. Its runs, with its own settings
([to the digit](../workloads_overrides/paper/README.md)) (not run here):

```sh
./run.sh experiments imagenet_vit --paper --data-dir DATA/imagenet/pytorch    # 9 runs
```
"""

__all__ = ["PAPER", "PAPER_SIZE", "SMALL", "add_flags", "draw", "run", "tables"]

FIGURE = FIGURES["imagenet_vit"]


def tables(result: dict[str, Any]) -> list[Table]:
    """Ours, and the paper's."""
    return target_runs.tables(result, FIGURE)


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Nine runs, or as many seeds as asked for."""
    contest = target_runs.of_tuned_images(("nadamw", "kfac_expand", "kfac_reduce"))
    return target_runs.run(contest, options, folder, console)
