"""The figures of the paper that this project reproduces, as reference rows.

Source: Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures", NeurIPS 2023 (arXiv 2311.00636): steps and hours to the validation target, ``mean ±
standard error`` over five (ogbg) and three (imagenet_vit) seeds, sections 4.2 and 4.3; of Figure 5,
one run each, section C.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One method of the paper on one workload.

    Attributes:
        label: name in tables.
        kind: ``"reference"``, ``"expand"`` or ``"reduce"``.
        steps, hours: mean steps and hours to target.
        steps_stderr, hours_stderr: their standard errors (NaN for a single run).
        every_step: of Figure 5, where the factors are updated in every step.
    """

    label: str
    kind: str
    steps: float
    steps_stderr: float
    hours: float
    hours_stderr: float
    every_step: bool = False


PAPER_ROWS: dict[str, tuple[PaperRow, ...]] = {
    "ogbg": (
        PaperRow("paper: reference (Nesterov)", "reference", 31_887, 2_070, 2.33, 0.22),
        PaperRow("paper: K-FAC-expand", "expand", 16_106, 863, 1.32, 0.11),
        PaperRow("paper: K-FAC-reduce", "reduce", 15_566, 429, 1.23, 0.03),
    ),
    "imagenet_vit": (
        PaperRow("paper: reference (NAdamW)", "reference", 122_139, 1_119, 26.10, 0.24),
        PaperRow("paper: K-FAC-expand", "expand", 87_464, 245, 19.57, 0.13),
        PaperRow("paper: K-FAC-reduce", "reduce", 92_550, 731, 20.28, 0.00),
        *(
            PaperRow(f"paper, Figure 5: {name}", kind, steps, math.nan, hours, math.nan, True)
            for name, kind, steps, hours in (
                ("reference (NAdamW)", "reference", 117_400, 25),
                ("K-FAC-expand", "expand", 92_600, 50),
                ("K-FAC-reduce", "reduce", 93_700, 37),
            )
        ),
    ),
}


def is_every_step(method: str) -> bool:
    """Whether a method's name says that it is one of Figure 5."""
    return "every_step" in method.lower().replace("-", "_").replace(" ", "_")


def paper_rows(workload: str, methods: Iterable[str]) -> list[PaperRow]:
    """The paper's rows on a workload, those of the figures that the methods belong to."""
    figures = {is_every_step(method) for method in methods}
    return [row for row in PAPER_ROWS.get(workload, ()) if row.every_step in figures]


def paper_row(workload: str, method: str) -> PaperRow | None:
    """The paper's K-FAC row that a method's name points to."""
    name = method.lower()
    kinds = [kind for kind in ("expand", "reduce") if kind in name]
    return None if len(kinds) != 1 else _find(workload, kinds[0], is_every_step(method))


def paper_reference(workload: str, row: PaperRow) -> PaperRow:
    """The reference that a row of the paper is compared with."""
    found = _find(workload, "reference", row.every_step)
    assert found is not None
    return found


def _find(workload: str, kind: str, every_step: bool) -> PaperRow | None:
    rows = PAPER_ROWS.get(workload, ())
    return next((r for r in rows if (r.kind, r.every_step) == (kind, every_step)), None)
