"""The rows of the tables: which methods run which network, and what each is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from benchmarks import methods, peers
from benchmarks.models import make_case
from benchmarks.timing import Step

METHODS = ("ours", "asdl", "curvlinops")
_STEPS: dict[str, methods.MakeStep] = {
    "ours": methods.ours_step,
    "asdl": peers.asdl_step,
    "curvlinops": peers.curvlinops_step,
}
_FACTORS: dict[str, methods.MakeStep] = {
    "ours": methods.ours_factors,
    "asdl": peers.asdl_factors,
    "curvlinops": peers.curvlinops_factors,
}


@dataclass(frozen=True)
class Row:
    """One method in one variant.

    Attributes:
        method: "sgd" or one of METHODS.
        approx: "expand" or "reduce"; "" for SGD.
        fisher: "mc" or "empirical"; "" for SGD.
    """

    method: str
    approx: str = ""
    fisher: str = ""

    @property
    def key(self) -> str:
        """Name in JSON files and on command lines."""
        return "-".join(part for part in (self.method, self.approx, self.fisher) if part)

    @property
    def title(self) -> str:
        """Name in tables."""
        approx = "swift" if (self.method, self.approx) == ("asdl", "reduce") else self.approx
        return " ".join(part for part in (self.method, approx, self.fisher) if part)

    @classmethod
    def parse(cls, key: str) -> Row:
        """The row of a key."""
        return cls(*key.split("-"))


SGD = Row("sgd")
NOTES = (
    "mc: one label sample; empirical: true labels, for which asdl needs no extra backward pass; "
    "asdl has no reduce, swift (SKFAC) is its nearest; curvlinops treats linear and convolution "
    "layers only"
)


def choose_rows(
    chosen: Iterable[str], approxes: Iterable[str], fishers: Iterable[str]
) -> list[Row]:
    """SGD, then the methods in all variants; peers with the empirical Fisher where it differs.

    curvlinops is left out with the empirical Fisher: it makes a backward pass of its own for it,
    so that its time is that of a Monte-Carlo sample.
    """
    return [SGD] + [
        Row(method, approx, fisher)
        for fisher in fishers
        for approx in approxes
        for method in chosen
        if not (method == "curvlinops" and fisher == "empirical")
    ]


def make_step(
    row: Row, model: str, batch_size: int, device: torch.device, size: str = "full"
) -> Step:
    """The row's step on a fresh copy of the network.

    Raises:
        PeerError: the row's library is not installed.
    """
    case = make_case(model, batch_size, device, size)
    if row.method == "sgd":
        return methods.sgd_step(case)
    makers = _FACTORS if case.factors_only else _STEPS
    return makers[row.method](case, row.approx, row.fisher)


def make_steps(
    rows: Iterable[Row], model: str, batch_size: int, device: torch.device, size: str = "full"
) -> tuple[dict[str, Step], dict[str, str]]:
    """(key -> step, key -> why there is none)."""
    steps: dict[str, Step] = {}
    failures: dict[str, str] = {}
    for row in rows:
        try:
            steps[row.key] = make_step(row, model, batch_size, device, size)
        except peers.PeerError as error:
            failures[row.key] = str(error)
    return steps, failures


def failure_lines(rows: Iterable[Row], failures: Mapping[str, str]) -> list[str]:
    """What to print below a table about rows that could not run."""
    return [f"{row.title}: {failures[row.key]}" for row in rows if row.key in failures]
