"""The figures of the paper that this project reproduces, as reference rows.

Source: Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures", NeurIPS 2023 (arXiv 2311.00636): steps to the validation target, ``mean ± standard
error`` over repetitions. The hours could not be verified against the paper's text and are None.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One method of the paper on one workload.

    Attributes:
        label: name in tables.
        kind: ``"reference"``, ``"expand"`` or ``"reduce"``.
        steps: mean steps to target.
        steps_stderr: its standard error.
        hours: mean hours to target (None: not verified).
    """

    label: str
    kind: str
    steps: float
    steps_stderr: float
    hours: float | None = None


PAPER_ROWS: dict[str, tuple[PaperRow, ...]] = {
    "ogbg": (
        PaperRow("paper: reference (Nesterov)", "reference", 31_887, 2_070),
        PaperRow("paper: K-FAC-expand", "expand", 16_106, 863),
        PaperRow("paper: K-FAC-reduce", "reduce", 15_566, 429),
    ),
    "imagenet_vit": (
        PaperRow("paper: reference (NAdamW)", "reference", 122_139, 1_119),
        PaperRow("paper: K-FAC-expand", "expand", 87_464, 245),
        PaperRow("paper: K-FAC-reduce", "reduce", 92_550, 731),
    ),
}


def paper_kind(method: str) -> str:
    """Which of the paper's K-FAC rows a method's name points to: expand, reduce or neither."""
    name = method.lower()
    kinds = [kind for kind in ("expand", "reduce") if kind in name]
    return kinds[0] if len(kinds) == 1 else ""
