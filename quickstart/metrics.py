"""Evaluation metrics, as AlgoPerf computes them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score

FloatArray = npt.NDArray[np.floating[Any]]


def mean_average_precision(
    logits: FloatArray, labels: FloatArray, mask: npt.NDArray[np.bool_]
) -> float:
    """Average precision of each task over its measured labels, averaged over tasks.

    As in AlgoPerf, labels that are not measured are 0, and a task counts if its column of `labels`
    holds both a 0 and a 1.

    Args:
        logits: scores, (graphs, tasks).
        labels: 0 or 1, and 0 where not measured, (graphs, tasks).
        mask: True where measured, (graphs, tasks).

    Returns:
        A number in [0, 1], NaN if no task counts.
    """
    scores = [
        average_precision_score(labels[mask[:, task], task], logits[mask[:, task], task])
        for task in range(labels.shape[1])
        if (labels[:, task] == 0).any() and (labels[:, task] == 1).any()
    ]
    return float(np.mean(scores)) if scores else float("nan")
