"""Figure 5: a ViT with factors in every step, a moving average, and gradient clipping.

Factors every step, averaged over time, inverses every 10 steps, clipped gradients, beside the main
setting (factors and inverses every 10 steps, no average, no clipping) and NAdamW: on the
quickstart's small ViT and scikit-learn's handwritten digits, or CIFAR-10 with --data-dir. The
paper's experiment, on ImageNet: --paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import image_tuning, target_runs
from experiments.paper.figures import FIGURES
from experiments.tables import Table
from experiments.target_runs import add_flags, draw

SMALL: list[str] = []
PAPER_SIZE = None  # a figure of `paper.figures`
PAPER = """
The paper's rows are of the ViT of Figure 4 on ImageNet: factors every step with a moving average,
inverses every 10 steps, damping 1e-5, clipping at 1, one run each ("about" so many hours, C.4). The
paper's average has beta2, 0.9982, as the weight of the *new* factor (`ema_decay` of ASDL), so the
old ones weigh 0.0018: hardly an average. The small runs above keep 0.95 of the old ones; this and
the largest norm of 1.0 were not tuned, learning rates were, for every method alike
([what was tried](../experiments/settings/images_tuning.json)). The paper's runs, with
[its own settings](../workloads_overrides/paper/README.md) (not run here):

```sh
./run.sh experiments every_step --paper --data-dir DATA/imagenet/pytorch    # 3 runs
```
"""

METHODS = image_tuning.METHODS

__all__ = ["PAPER", "PAPER_SIZE", "SMALL", "add_flags", "draw", "run", "tables"]

FIGURE = FIGURES["every_step"]


def tables(result: dict[str, Any]) -> list[Table]:
    """Ours, and the paper's."""
    return target_runs.tables(result, FIGURE)


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Fifteen runs, or as many seeds as asked for."""
    return target_runs.run(target_runs.of_tuned_images(METHODS), options, folder, console)
