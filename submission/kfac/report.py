"""What trains every parameter: the table shown at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .parameters import LinearView
from .partition import Partition
from .statistics import DiagonalPart, KroneckerPart, Part, UnitwisePart, statistics_dtype


@dataclass(frozen=True)
class ReportRow:
    """One part of the model. `memory` is that of its factors and inverses, in bytes."""

    name: str
    layer: str
    sides: str
    sharing: str
    preconditioner: str
    parameters: int
    memory: int
    reason: str


def report_rows(partition: Partition, fallback: str, calls: Mapping[str, str]) -> list[ReportRow]:
    """Rows in the order of the parts.

    Args:
        fallback: what trains parameters outside K-FAC layers: as in `KFACConfig`, or "adam".
        calls: part name -> how its rows are shared, if known.
    """
    return [
        _row(part, partition.reasons.get(part.name, ""), fallback, calls.get(part.name, "-"))
        for part in partition.parts
    ]


def _row(part: Part, reason: str, fallback: str, sharing: str) -> ReportRow:
    parameters = [piece.data for piece in part.slices]
    count = sum(p.numel() for p in parameters)
    itemsize = statistics_dtype(parameters[0]).itemsize
    if isinstance(part, KroneckerPart):
        groups, (out_side, in_side) = part.kind.groups(part.module), part.sides
        entries = in_side if part.diagonal_input else in_side**2
        entries += out_side if part.diagonal_gradient else out_side**2
        a, b = ("diag " * diag for diag in (part.diagonal_input, part.diagonal_gradient))
        sides = f"{a}{in_side} x {b}{out_side}"
        return ReportRow(
            part.name,
            _type_name(part),
            f"{groups} x ({sides})" if groups > 1 else sides,
            sharing,
            f"K-FAC-{part.approx}",
            count,
            2 * groups * entries * itemsize,
            reason,
        )
    how = "raw gradient"
    entries = 0
    if isinstance(part, DiagonalPart) and part.sparse:
        reason += "; sparse gradients are left as they are"
    elif fallback == "adam":
        how, entries = "Adam", 2 * count
    elif fallback == "diagonal":
        if isinstance(part, UnitwisePart):
            how, entries = "unit-wise", 2 * (3 if part.has_bias else 1) * parameters[0].numel()
        elif part.by_row:
            how, entries = "diagonal, by row", 2 * parameters[0].shape[0]
        else:
            how, entries = "diagonal", 2 * parameters[0].numel()
    layer = type(part.module).__name__ if isinstance(part, UnitwisePart) else "Parameter"
    shape = " x ".join(str(s) for s in parameters[0].shape) or "1"
    return ReportRow(part.name, layer, shape, sharing, how, count, entries * itemsize, reason)


def format_report(rows: list[ReportRow]) -> str:
    """A plain text table with totals, and the list of parameters outside K-FAC layers."""
    header = (
        "layer",
        "type",
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
        f"total: {total:,} parameters, {100 * covered / total:.1f} % in K-FAC layers; "
        f"factors and inverses {_mib(sum(r.memory for r in rows))}"
    )
    lines += [f"not K-FAC: {r.name}: {r.preconditioner} ({r.reason})" for r in rows if r.reason]
    return "\n".join(lines)


def _type_name(part: KroneckerPart) -> str:
    if isinstance(part.module, LinearView):
        return "Linear, fused"
    name = type(part.module).__name__
    if part.embedding is not None:
        return f"{name} + Embedding, tied"
    return f"{name} x {1 + len(part.also)}, tied" if part.also else name


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
