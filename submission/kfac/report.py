"""What trains every parameter: the table shown at start-up."""

from __future__ import annotations

from dataclasses import dataclass

from .blocks.structure import Structure
from .config import KFACConfig
from .linalg.tree import leaves
from .state import KFACState

ITEM = 4  # bytes of an entry of a factor before there is one


@dataclass(frozen=True)
class ReportRow:
    """One block of the model. `memory` is that of its factors and inverses, in bytes."""

    name: str
    layer: str
    sides: str
    sharing: str
    preconditioner: str
    parameters: int
    memory: int
    reason: str


def report_rows(
    structure: Structure, config: KFACConfig, state: KFACState | None = None
) -> list[ReportRow]:
    """Rows in the order of the blocks."""
    adam = config.rule.is_finished
    rows = []
    for block in structure.blocks:
        raw = config.fallback == "gradient" and not adam and not block.has_factors
        kind, sides, how, entries = block.row(adam, raw)
        own = None if state is None else state.blocks.get(block.name)
        reason = structure.reasons.get(block.name, "")
        is_known = own is not None and own.curvature is not None
        has_begun = state is not None and state.step > 0
        if has_begun and not is_known and (block.has_factors or not adam) and not raw:
            reason = reason or "the loss has not reached it so far"
            how, entries = "Adam" if adam else "raw gradient", 0
        parameters = sum(piece.numel for piece in block.pieces)
        known = {} if own is None or own.curvature is None else leaves(own.curvature)
        item = next((tensor.element_size() for tensor in known.values()), ITEM)
        memory = (entries if how == "Adam" else 2 * entries) * item
        sharing = "-" if own is None else own.shared_over
        rows.append(ReportRow(block.name, kind, sides, sharing, how, parameters, memory, reason))
    return rows


def format_report(rows: list[ReportRow]) -> str:
    """A plain text table with totals, and the list of parameters without factors."""
    header = (
        "block",
        "kind",
        "factor sides (A x B)",
        "shared over",
        "preconditioner",
        "parameters",
        "memory",
    )
    table = [header] + [
        (
            r.name or "(model)",
            r.layer,
            r.sides,
            r.sharing,
            r.preconditioner,
            f"{r.parameters:,}",
            _mib(r.memory),
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if i >= len(header) - 2 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    total = sum(r.parameters for r in rows)
    covered = sum(r.parameters for r in rows if r.preconditioner.startswith("K-FAC"))
    lines.append(
        f"total: {total:,} parameters, {100 * covered / total:.1f} % with Kronecker factors; "
        f"factors and inverses {_mib(sum(r.memory for r in rows))}"
    )
    lines += [f"not K-FAC: {r.name}: {r.preconditioner} ({r.reason})" for r in rows if r.reason]
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
