"""Which share of the parameters of public architectures is in Kronecker blocks, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table

from benchmarks.architectures import ARCHITECTURES, Architecture
from submission.kfac import KFAC, KFACConfig, Preconditioner

LARGEST = 3  # blocks without factors that are named
RATES = (1e-3, 3e-3, 1e-2)  # that Adam would take on small models


@dataclass(frozen=True)
class Coverage:
    """One architecture.

    Attributes:
        parameters: number of trainable ones.
        covered: share of them in Kronecker blocks, in per cent.
        rest: the largest blocks without factors, with their reasons.
        missing: the package that is not installed, in place of figures.
    """

    name: str
    parameters: int = 0
    covered: float = 0.0
    rest: str = ""
    missing: str = ""


def coverage_of(name: str) -> Coverage:
    """Records one pass of an architecture."""
    torch.manual_seed(0)
    try:
        case = ARCHITECTURES[name]()
    except ModuleNotFoundError as error:
        return Coverage(name, missing=str(error.name))
    config = KFACConfig(
        kfac_approx="expand", fisher_type="empirical", damping_kind="exact",
        direction="eigenbasis_adam", factor_decay=0.9, **case.settings,
    )  # fmt: skip
    kfac = Preconditioner(case.model, config)
    with kfac.record(case.sharing):
        case.loss(case.model)
    rows = kfac.report()
    total = sum(row.parameters for row in rows)
    covered = sum(row.parameters for row in rows if row.preconditioner.startswith("K-FAC"))
    rest = sorted((row for row in rows if row.reason), key=lambda row: -row.parameters)
    named = "; ".join(f"{r.name} ({r.parameters:,}: {r.reason})" for r in rest[:LARGEST])
    return Coverage(name, total, 100 * covered / total, named)


def first_steps(name: str, steps: int) -> list[float]:
    """Loss after some steps on one batch over the loss before, for each of RATES.

    With KFAC's defaults; dropout as in training, the same before and after.
    """
    ratios = []
    for rate in RATES:
        torch.manual_seed(0)
        case = ARCHITECTURES[name]()
        optimizer = KFAC(case.model, lr=rate, **case.settings)
        before = _loss_of(case)
        for _ in range(steps):
            with optimizer.record(case.sharing):
                loss = case.loss(case.model)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        ratios.append(_loss_of(case) / before)
    return ratios


def _loss_of(case: Architecture) -> float:
    torch.manual_seed(1)
    with torch.no_grad():
        return float(case.loss(case.model))


def first_steps_markdown(results: dict[str, list[float]], steps: int) -> str:
    """The table for the docs."""
    head = " | ".join(f"lr {rate:g}" for rate in RATES)
    lines = [f"| loss after {steps} steps / before | {head} |", "|---" * (len(RATES) + 1) + "|"]
    for name, ratios in results.items():
        lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def coverage_table(results: list[Coverage]) -> Table:
    """One line an architecture."""
    table = Table(title="share of the parameters with Kronecker factors")
    table.add_column("architecture")
    table.add_column("parameters", justify="right")
    table.add_column("%", justify="right")
    table.add_column("largest without, and why")
    for one in results:
        if one.missing:
            table.add_row(one.name, "", "", f"{one.missing} is not installed")
        else:
            table.add_row(one.name, f"{one.parameters:,}", f"{one.covered:.1f}", one.rest)
    return table


def coverage_markdown(results: list[Coverage]) -> str:
    """The table for the docs."""
    lines = ["| architecture | parameters | % in Kronecker blocks | largest without, and why |",
             "|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {one.name} | {one.parameters:,} | {one.covered:.1f} | {one.rest} |"
        for one in results
        if not one.missing
    ]
    return "\n".join(lines)
