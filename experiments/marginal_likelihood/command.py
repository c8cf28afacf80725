"""The command `python -m experiments marginal_likelihood`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from experiments import cifar, results
from experiments.marginal_likelihood.timing import time_large_net, time_update
from experiments.marginal_likelihood.training import (
    APPROXES,
    FREQUENCY,
    METHODS,
    OPTIMIZERS,
    Batches,
    load_laplace,
    make_model,
    train,
)
from experiments.paper.sizes import PaperSize, missing_cifar
from quickstart import images
from quickstart.errors import QuickstartError, writing

SMALL: list[str] = []
PAPER_SIZE = PaperSize(
    table="Tables 2 and 5: weight decays of a Wide ResNet 16-4 (Fixup) on CIFAR-10",
    flags=(
        *("--depth=16", "--width=4", "--epochs=100", "--batch-size=128", "--optimizer=sgd"),
        *("--learning-rate=0.1", "--last-learning-rate=1e-6", "--weight-decay=5e-3"),
        *("--whole-train", "--resume", "--methods", "expand", "reduce", "--seeds", "0", "1", "2"),
    ),
    runs="2 approximations x with and without augmentation x 3 seeds, 100 epochs each, "
    "weight decays updated every 5",
    hardware="one A100",
    time="not told; an update takes 196 ± 22 s (expand) and 99 ± 23 s (reduce), the whole training "
    "with reduce 75 % of that with expand",
    missing=missing_cifar,
)
PAPER = """
The paper has a Wide ResNet 16-4 (Fixup) on CIFAR-10, mean ± s.e. over three seeds, updates timed on
an A100; with reduce the whole training takes 75 % of its time with expand (C.5). At its size (batch
128, SGD with learning rate 0.1, cosine to 1e-6, initial weight decay 5e-3, 100 epochs, an update
every five; momentum 0.9 and ten steps an update are ours, the paper does not tell them):
`./run.sh experiments marginal_likelihood --paper --data-dir DIR`
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes, data, device."""
    add = parser.add_argument
    add("--data-dir", type=Path, help="CIFAR-10 (default: scikit-learn's digits)")
    add("--depth", type=int, default=10, help="6n + 4 (default: 10)")
    add("--width", type=int, default=1, help="widening factor (default: 1)")
    add("--epochs", type=int, default=30, help="5 or more (default: 30)")
    add("--batch-size", type=int, default=128)
    add("--optimizer", choices=list(OPTIMIZERS), default="adam", help="adam, or sgd with momentum")
    add("--learning-rate", type=float, default=3e-3, help="at the start (default: 0.003)")
    add("--last-learning-rate", type=float, default=0.0, help="of the cosine (default: 0)")
    add("--weight-decay", type=float, help="at the start (default: 1 / training images)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    add("--repeats", type=int, default=5, help="timed updates of each (default: 5)")
    add("--large-batches", type=int, default=4,
        help="timed batches of the paper's network; 0 leaves it out (default: 4)")  # fmt: skip
    add("--train-images", type=int, help="take only so many training images")
    add("--whole-train", action="store_true", help="train on the validation images too")
    add("--resume", action="store_true",
        help="take over nets that were trained with the same flags before")  # fmt: skip
    add("--device", default=results.default_device())


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Trains all nets, then times updates on the last one."""
    load_laplace()
    if options.epochs < FREQUENCY:
        raise QuickstartError(
            f"--epochs must be {FREQUENCY} or more: that often decays are learned"
        )
    if options.repeats < 1 or options.batch_size < 1:
        raise QuickstartError("--repeats and --batch-size must be 1 or more")
    data = images.load_digits() if options.data_dir is None else cifar.load(options.data_dir)
    if options.train_images:
        data.splits["train"] = data.splits["train"][: options.train_images]
    if options.whole_train:
        both = [data.splits["train"], data.splits["validation"]]
        data.splits["train"] = np.concatenate(both)
    jobs = [(m, a, s) for s in options.seeds for a in (False, True) for m in METHODS]
    jobs = [job for job in jobs if job[0] in options.methods]
    device = torch.device(options.device)
    torch.manual_seed(0)
    model: nn.Module = make_model(options, data).to(device)  # of updates, where none is trained
    runs = []
    for method, augment, seed in track(jobs, "training", console=console, transient=True):
        kept = _Kept(folder, options, method, augment, seed)
        outcome = kept.read() if options.resume else None
        if outcome is None:
            model, outcome = train(options, data, method, augment, seed)
            kept.write(outcome)
        runs.append(outcome)
    updates: dict[str, list[dict[str, float]]] = {approx: [] for approx in APPROXES}
    for number in range(options.repeats + 1):
        for approx in APPROXES if number % 2 else APPROXES[::-1]:
            batches = Batches(data, options.batch_size, number, False, device)
            seconds = time_update(model, batches, approx)
            if number:  # the first is not counted
                updates[approx].append(seconds)
    large = None
    if options.large_batches > 0:
        pictured = None if options.data_dir is None else data
        large = time_large_net(pictured, device, options.large_batches)
    return {
        "data": data.name,
        "large": large,
        "train_images": len(data.splits["train"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "runs": runs,
        "updates": updates,
    }


class _Kept:
    """The outcome of one training on disk, for a command that is given again."""

    def __init__(
        self, folder: Path, options: argparse.Namespace, method: str, augment: bool, seed: int
    ) -> None:
        name = f"{method}_{'augmented' if augment else 'plain'}_{seed}.json"
        self._path = folder / "trained" / name
        names = (
            *("data_dir", "depth", "width", "epochs", "batch_size", "optimizer", "learning_rate"),
            *("last_learning_rate", "weight_decay", "train_images", "whole_train"),
        )
        self._settings = {name: str(getattr(options, name)) for name in names}

    def read(self) -> dict[str, Any] | None:
        """The outcome, None if there is none with these settings."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        found: dict[str, Any] = content["outcome"]
        return found if content["settings"] == self._settings else None

    def write(self, outcome: dict[str, Any]) -> None:
        """Keeps it, whole or not at all."""
        with writing(self._path) as temporary:
            content = {"settings": self._settings, "outcome": outcome}
            temporary.write_text(json.dumps(content), encoding="utf-8")
