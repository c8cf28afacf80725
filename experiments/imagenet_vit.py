"""Figure 4: steps and time to a target of a ViT on images, against NAdamW.

The paper's experiment is AlgoPerf's imagenet_vit on V100s; its commands are on the results page.
This is its scaled version: the quickstart's small ViT on scikit-learn's handwritten digits, or on
CIFAR-10 with --data-dir, with NAdamW and K-FAC-expand and K-FAC-reduce in front of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import target_runs
from experiments.target_runs import add_flags, draw, tables

SMALL: list[str] = []
PAPER = """
Here every method was tuned with three learning rates and a seed of its own
([what was tried](../experiments/settings/images_tuning.json)). The paper, steps to a validation
accuracy of 0.77309 on ImageNet, mean ± s.e. (its hours were not available):

| reference (NAdamW) | K-FAC-expand | K-FAC-reduce |
|---:|---:|---:|
| 122,139 ± 1,119 | 87,464 ± 245 (0.72) | 92,550 ± 731 (0.76) |

Its runs, on V100s (not run here; the learning rates and dampings of the K-FAC files are ranges of
ours, see [the settings](../workloads_overrides/paper/README.md)):

```sh
NPROC=8 ./run.sh algoperf --paper-budget -- --workload=imagenet_vit \\
  --data_dir=DATA/imagenet/pytorch --experiment_dir=runs --experiment_name=reference \\
  --tuning_search_space=workloads_overrides/paper/imagenet_vit/reference.json
for approx in expand reduce; do for trial in 0 1 2 3 4; do
  NPROC=8 ./run.sh algoperf --paper-budget -- --workload=imagenet_vit \\
    --data_dir=DATA/imagenet/pytorch --num_tuning_trials=5 \\
    --tuning_search_space=workloads_overrides/paper/imagenet_vit/kfac_$approx.json \\
    --hparam_start_index=$trial --hparam_end_index=$((trial + 1)) \\
    --experiment_dir=runs --experiment_name=kfac_$approx
done; done
./run.sh compare runs --reference reference
```
"""

__all__ = ["PAPER", "SMALL", "add_flags", "draw", "run", "tables"]


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Nine runs, or as many seeds as asked for."""
    contest = target_runs.of_tuned_images(("nadamw", "kfac_expand", "kfac_reduce"))
    return target_runs.run(contest, options, folder, console)
