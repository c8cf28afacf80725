"""What K-FAC's factors need of a GPU's memory, workload by workload, without a GPU.

    python -m workloads_overrides.factor_memory [WORKLOAD ...] [--hardware v100|a100] [--layers]

Layers and activations come from `recorded_models.json` (see `model_record`), the factors from the
submission's own partition of those layers. What is left for factors on one of AlgoPerf's GPUs (8
V100 with 16 GiB, or 4 A100 with 40) is its memory less

- the parameters, their gradients, DistributedDataParallel's buckets (a copy of the gradients) and
  NAdamW's two moments: five times the parameters;
- what autograd keeps for the backward pass at the submission's batch size, shared by the GPUs:
  measured on a small batch and scaled by the number of examples. This is on a CPU: some of CUDA's
  kernels keep less;
- 1 GiB for CUDA's context, libraries and fragmentation, an assumption.

Factors count three times: the average, the inverse, and the new sums while they are built. Every
rank holds all of them; `inverse_placement` "one_rank" would share out the inverses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from submission.kfac import KFACConfig
from submission.kfac.discovery import structure_from, trainable_parameters
from submission.kfac.report import ReportRow, report_rows
from submission.submission import get_batch_size
from workloads_overrides.model_record import RECORD, skeleton, uses_of

GIB = 2**30
RESERVED = 1 * GIB
COPIES_OF_PARAMETERS = 5  # value, gradient, DDP bucket, two moments
ITEM = 4  # bytes of a float32
COPIES_OF_FACTORS = 3  # average, inverse, new sums
REPORTED_COPIES = 2  # of which the engine's report counts the first two


@dataclass(frozen=True)
class Hardware:
    """A machine: its GPUs, the bytes of each, and the workloads that its rules do not have."""

    name: str
    gpus: int
    memory: int
    without: frozenset[str] = frozenset()


HARDWARE = {
    "v100": Hardware("8 V100 with 16 GiB", 8, 16 * GIB, frozenset({"finewebedu_lm"})),
    "a100": Hardware("4 A100 with 40 GiB", 4, 40 * GIB),
}


@dataclass(frozen=True)
class Memory:
    """One workload on one of a machine's GPUs; sizes in bytes.

    Attributes:
        rows: the engine's report, layer by layer.
        parameters: number of them.
        activations: kept for the backward pass.
        factors: averages, inverses and new sums.
        budget: what is left for factors.
    """

    workload: str
    batch_size: int
    rows: tuple[ReportRow, ...]
    parameters: int
    activations: int
    factors: int
    budget: int

    @property
    def fits(self) -> bool:
        """Whether the factors stay within the budget."""
        return self.factors <= self.budget

    def shares(self) -> dict[str, float]:
        """Preconditioner -> share of the parameters, in per cent."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts[row.preconditioner] += row.parameters
        return {name: 100 * count / self.parameters for name, count in counts.most_common()}


def recorded_workloads() -> list[str]:
    """Names of the workloads in the record."""
    return list(json.loads(RECORD.read_text()))


def memory_of(workload: str, settings: KFACConfig, hardware: Hardware = HARDWARE["v100"]) -> Memory:
    """Memory of a recorded workload on one GPU.

    Raises:
        KeyError: it is not in the record.
    """
    record = json.loads(RECORD.read_text())[workload]
    model = skeleton(record["modules"])
    structure = structure_from(
        uses_of(model), {}, trainable_parameters(model), settings, settings.kfac_approx
    )
    rows = tuple(report_rows(structure, settings))
    parameters = sum(row.parameters for row in rows)
    per_gpu = max(1, get_batch_size(workload) // hardware.gpus)
    activations = record["saved_bytes"] * per_gpu // record["measured_batch"]
    used = COPIES_OF_PARAMETERS * ITEM * parameters + activations + RESERVED
    return Memory(
        workload=workload,
        batch_size=per_gpu,
        rows=rows,
        parameters=parameters,
        activations=activations,
        factors=sum(row.memory for row in rows) * COPIES_OF_FACTORS // REPORTED_COPIES,
        budget=hardware.memory - used,
    )


def summary_table(found: Sequence[Memory], hardware: Hardware) -> Table:
    """One line per workload."""
    table = Table(title=f"one of {hardware.name}")
    for heading in ("workload", "preconditioned by", "fits"):
        table.add_column(heading)
    for heading in (
        "parameters", "batch per GPU", "layers", "widest side", "activations", "factors", "budget",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for memory in found:
        shares = ", ".join(f"{name} {share:.1f} %" for name, share in memory.shares().items())
        layers = [row for row in memory.rows if row.preconditioner.startswith("K-FAC")]
        table.add_row(
            memory.workload,
            shares,
            "yes" if memory.fits else "NO",
            f"{memory.parameters:,}",
            str(memory.batch_size),
            str(len(layers)),
            max((row.sides for row in layers), key=_widest_full_side, default="-"),
            f"{memory.activations / GIB:.2f} GiB",
            f"{memory.factors / GIB:.2f} GiB",
            f"{memory.budget / GIB:.2f} GiB",
        )
    return table


def _widest_full_side(sides: str) -> int:
    """The larger side of "3 x (diag 1025 x 512)" whose factor is not only a diagonal; 0 if none."""
    inner = sides[sides.index("(") + 1 : -1] if "(" in sides else sides
    full = [side for side in inner.split(" x ") if not side.startswith("diag")]
    return max(map(int, full), default=0)


def layer_table(memory: Memory) -> Table:
    """One line per part of a model."""
    table = Table(title=memory.workload)
    for heading in ("layer", "type", "sides (A x B)", "preconditioner", "reason"):
        table.add_column(heading)
    table.add_column("parameters", justify="right")
    table.add_column("MiB", justify="right")
    for row in memory.rows:
        size = row.memory * COPIES_OF_FACTORS / REPORTED_COPIES / 2**20
        table.add_row(
            row.name, row.layer, row.sides, row.preconditioner, row.reason,
            f"{row.parameters:,}", f"{size:.2f}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 1 if a workload exceeds its budget."""
    known = recorded_workloads()
    parser = argparse.ArgumentParser(prog="./run.sh memory", allow_abbrev=False)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(known))
    parser.add_argument("--kfac_approx", choices=("expand", "reduce"), default="reduce")
    parser.add_argument("--max_factor_side", type=int, default=KFACConfig.max_factor_side)
    parser.add_argument("--hardware", choices=tuple(HARDWARE), help="default: both")
    parser.add_argument("--layers", action="store_true", help="also a table of every layer")
    arguments = parser.parse_args(argv)
    for name in arguments.workloads:
        if name not in known:
            parser.error(f"'{name}' is not recorded; there are {', '.join(known)}")
    settings = KFACConfig(
        kfac_approx=arguments.kfac_approx, max_factor_side=arguments.max_factor_side
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    too_large = []
    for kind in [arguments.hardware] if arguments.hardware else HARDWARE:
        hardware = HARDWARE[kind]
        names = arguments.workloads or [name for name in known if name not in hardware.without]
        found = [memory_of(name, settings, hardware) for name in names]
        if arguments.layers:
            for memory in found:
                console.print(layer_table(memory))
        console.print(summary_table(found, hardware))
        too_large += [f"{memory.workload} on {kind}" for memory in found if not memory.fits]
    if too_large:
        console.print(f"over budget: {', '.join(too_large)}")
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
