"""Which experiments there are, and what a module must offer to be one."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from experiments.paper.sizes import PaperSize
from experiments.tables import Table


class ExperimentModule(Protocol):
    """What each experiment's module defines.

    Attributes:
        SMALL: flags of the size that `all --small` runs.
        PAPER: what the paper says about it, as Markdown, for the results page.
        PAPER_SIZE: what --paper runs; None where that is a figure of `paper.figures`, or where
            the experiment has one size only.
    """

    SMALL: list[str]
    PAPER: str
    PAPER_SIZE: PaperSize | None

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Adds the experiment's own flags."""

    def run(self, options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
        """Does the work; returns the result as plain values for JSON."""

    def tables(self, result: dict[str, Any]) -> list[Table]:
        """The result as tables for the screen and for the results page."""

    def draw(self, result: dict[str, Any], path: Path) -> bool:
        """Draws the result as a PNG file; False if there is nothing to draw."""


@dataclass(frozen=True)
class Experiment:
    """An entry of the list.

    Attributes:
        name: of the command and of the module.
        paper: the table or figure.
        shows: in a few words.
        time: of the default run on two CPU cores.
        needs: beyond the packages of the quickstart.
        extra: whether requirements/experiments.txt is needed.
        in_all: whether `all` runs it and the results page shows it; others have their own page.
    """

    name: str
    paper: str
    shows: str
    time: str
    needs: str
    extra: bool = False
    in_all: bool = True

    def load(self) -> ExperimentModule:
        """Imports the experiment's module."""
        return cast(ExperimentModule, importlib.import_module(f"experiments.{self.name}"))


EXPERIMENTS = (
    Experiment(
        "exactness",
        "Figures 1, 2",
        "both approximations against the exact GGN of a deep linear net",
        "1 second",
        "nothing",
    ),
    Experiment(
        "update_step_timing",
        "Tables 1, 3",
        "time of a K-FAC update step of a Wide ResNet 16-4, by batch size",
        "4 minutes",
        "nothing; CIFAR-10 with --data-dir",
    ),
    Experiment(
        "gpt_ggn_timing",
        "Table 4",
        "time of a GPT's K-FAC GGN over a text corpus",
        "2 minutes",
        "a download of 1.5 MB, or --text",
    ),
    Experiment(
        "marginal_likelihood",
        "Tables 2, 5",
        "one weight decay per layer learned by the marginal likelihood",
        "3 minutes",
        "laplace-torch; CIFAR-10 with --data-dir",
        extra=True,
    ),
    Experiment(
        "every_step",
        "Figure 5",
        "ViT with factors every step, a moving average and clipping",
        "2 minutes",
        "nothing; CIFAR-10 with --data-dir",
    ),
    Experiment(
        "ogbg",
        "Figure 3",
        "steps to target of a GraphNetwork on molecules",
        "2 minutes",
        "a download of 20 MB",
    ),
    Experiment(
        "imagenet_vit",
        "Figure 4",
        "steps to target of a ViT on images",
        "1.5 minutes",
        "nothing; CIFAR-10 with --data-dir",
    ),
    Experiment(
        "optimizers",
        "not in it",
        "ours against SOAP, Muon, Shampoo, NAdamW and Nesterov on six small real tasks",
        "many hours; minutes with --small",
        "packages that `./run.sh experiments optimizers` installs; CIFAR-10 with --data-dir",
        extra=True,
        in_all=False,
    ),
)


def find(name: str) -> Experiment | None:
    """The experiment of that name."""
    return next((e for e in EXPERIMENTS if e.name == name), None)
