"""Tables and a picture of what was learned and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments import pictures
from experiments.marginal_likelihood.timing import LARGE_BATCH
from experiments.marginal_likelihood.training import APPROXES, METHODS
from experiments.paper import numbers
from experiments.tables import Table, mean_and_error, plus_minus


def update_seconds(result: dict[str, Any], approx: str) -> list[float]:
    """Seconds of each timed update, all parts together."""
    return [sum(parts.values()) for parts in result["updates"][approx]]


def _select(result: dict[str, Any], method: str, augment: bool) -> list[dict[str, Any]]:
    return [r for r in result["runs"] if r["method"] == method and r["augment"] == augment]


def _paper(method: str, augment: bool) -> tuple[str, str]:
    """NLL and accuracy of the paper, which has no fixed weight decays."""
    if method not in APPROXES:
        return "-", "-"
    key = (method, augment)
    nll = numbers.shown(numbers.TEST_NLL[key], 3)
    return nll, numbers.shown(numbers.TEST_ACCURACY_PERCENT[key])


def tables(result: dict[str, Any]) -> list[Table]:
    """Test results; learned weight decays; time of an update."""
    tested = []
    for augment in (False, True):
        for method in METHODS:
            runs = _select(result, method, augment)
            if not runs:
                continue
            name = f"K-FAC-{method}" if method in APPROXES else "fixed weight decay"
            cells = [plus_minus([r[key] for r in runs]) for key in ("nll", "accuracy")]
            last = [r["log_marginal_likelihoods"][-1:] for r in runs]
            known = [value for values in last for value in values]
            marginal = plus_minus(known, 0) if known else "-"
            tested.append(
                (name, "yes" if augment else "no", *cells, marginal, *_paper(method, augment))
            )
    reference = mean_and_error(update_seconds(result, "expand"))[0]
    timed = []
    for approx in APPROXES:
        seconds = update_seconds(result, approx)
        fit, steps = (
            plus_minus([parts[key] for parts in result["updates"][approx]])
            for key in ("fit", "steps")
        )
        share = f"{mean_and_error(seconds)[0] / reference:.0%}"
        paper = numbers.shown(numbers.UPDATE_SECONDS[approx], 0)
        percent = f"{numbers.UPDATE_PERCENT[approx]:g}%"
        timed.append((f"K-FAC-{approx}", plus_minus(seconds), fit, steps, share, paper, percent))
    large = []
    if result["large"] is not None:
        by_batch = {a: parts["batch"] for a, parts in result["large"]["seconds"].items()}
        whole = mean_and_error(by_batch["expand"])[0]
        for approx in APPROXES:
            share = f"{mean_and_error(by_batch[approx])[0] / whole:.0%}"
            once = plus_minus(result["large"]["seconds"][approx]["eigenvalues"], 1)
            large.append((f"K-FAC-{approx}", plus_minus(by_batch[approx]), share, once))
    of = f"{result['data']}, {result['train_images']:,} training images"
    shown = [
        Table(
            f"Test set, mean ± s.e. over seeds ({of}, {result['parameters']:,} parameters)",
            (
                *("weight decays by", "augmented", "NLL", "accuracy", "log marginal likelihood"),
                *("the paper's NLL", "the paper's accuracy, %"),
            ),
            tuple(tested),
        ),
        Table(
            "Seconds of one update of the weight decays, mean ± s.e.",
            (
                *("", "update", "factors and eigenvalues", "10 steps", "of expand's time"),
                *("the paper's update", "of expand's time"),
            ),
            tuple(timed),
        ),
    ]
    if large:
        shown.append(
            Table(
                f"Seconds in the paper's network, Wide ResNet 16-4 ({result['large']['pixels']})",
                ("", f"factors of {LARGE_BATCH} images", "of expand's time", "eigenvalues, once"),
                tuple(large),
            )
        )
    return shown


def draw(result: dict[str, Any], path: Path) -> bool:
    """Learned weight decay of each layer."""
    picture, axes = pictures.figure(2, 1, 9, 3.4)
    fixed = 1 / result["train_images"]
    for axis, augment in zip(axes[0], (False, True), strict=True):
        for shift, approx in ((-0.2, "expand"), (0.2, "reduce")):
            runs = _select(result, approx, augment)
            if not runs:  # another choice of methods
                continue
            layers = list(runs[0]["weight_decay"])
            means = [mean_and_error([r["weight_decay"][k] for r in runs])[0] for k in layers]
            places = np.arange(len(layers)) + shift
            axis.bar(places, means, 0.4, color=pictures.COLOURS[approx], label=f"K-FAC-{approx}")
        axis.axhline(fixed, color="grey", linestyle="--", label="start, and fixed")
        axis.set_yscale("log")
        axis.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
        axis.set_title("with augmentation" if augment else "without augmentation", fontsize=9)
    axes[0][0].set_ylabel("learned weight decay")
    axes[0][0].legend(fontsize=7)
    pictures.save(picture, path)
    return True
