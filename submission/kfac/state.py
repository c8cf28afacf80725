"""Everything that K-FAC carries from step to step, and how it is saved and restored."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .blocks.block import Block, BlockCurvature, Inverse
from .blocks.diagonal import Diagonal, Reciprocal, UnitInverse, Unitwise
from .blocks.factors import EigenInverse, Factors, KroneckerInverse
from .linalg import tree
from .linalg.eigenbasis import Basis, Moments
from .linalg.factor import Factor
from .linalg.inverses import CholeskyInverse, DiagonalInverse, ExplicitInverse, LowRankInverse
from .operations.pieces import Matrix, Piece
from .operations.uses import LinearUse, UnitUse, Use

logger = logging.getLogger(__name__)
STATE_VERSION = 5

# What a saved state may consist of.
TYPES: dict[str, type[Any]] = {
    t.__name__: t
    for t in (
        Factors, Factor, Unitwise, Diagonal, KroneckerInverse, EigenInverse, UnitInverse,
        Reciprocal, ExplicitInverse, CholeskyInverse, LowRankInverse, DiagonalInverse, Basis,
        Moments, LinearUse, UnitUse, Matrix, Piece,
    )
}  # fmt: skip


@dataclass
class BlockState:
    """What is kept of one block.

    Attributes:
        curvature: on average; None before the block was reached.
        updates: number of updates in the average.
        inverse: None before it was made, or where another rank has it.
        moments: of "eigenbasis_adam" and "eigenbasis_polar".
        shared_over: how its rows are shared, in words.
    """

    curvature: BlockCurvature | None = None
    updates: int = 0
    inverse: Inverse | None = None
    moments: Moments | None = None
    shared_over: str = "-"


def _no_failures() -> dict[str, int]:
    return {"statistics": 0, "inverse": 0, "memory": 0}


def _no_seconds() -> dict[str, float]:
    return {"factors": 0.0, "inverses": 0.0, "precondition": 0.0}


@dataclass
class KFACState:
    """The mutable state of `Preconditioner`.

    Attributes:
        damping: λ in use.
        approx: "expand" or "reduce"; None until it is decided.
        uses, others: what recorded passes have shown of the model, on any rank: uses of parameters,
            and name of a parameter -> how it is used besides. None before the first one.
        step: finished steps.
        corrections: updates of the corrected eigenvalues in the present basis.
        inverses_stale: whether inverses have to be made: there are none yet, or some are missing.
        damping_changed: whether the damping has changed since the inverses were made.
        failures, failures_in_a_row: updates that were dropped, by kind.
        seconds: time spent, by phase.
        examples_share: share of the examples whose rows enter the factors; halved whenever memory
            runs out.
        count: likewise: the number of steps in the moments.
        blocks: name of a block -> what is kept of it.
    """

    damping: float
    approx: str | None
    uses: dict[Use, None] | None = None
    others: dict[str, str] = field(default_factory=dict)
    step: int = 0
    corrections: int = 0
    inverses_stale: bool = True
    damping_changed: bool = False
    failures_in_a_row: int = 0
    failures: dict[str, int] = field(default_factory=_no_failures)
    seconds: dict[str, float] = field(default_factory=_no_seconds)
    examples_share: float = 1.0
    count: Tensor | None = None
    blocks: dict[str, BlockState] = field(default_factory=dict)

    def of(self, block: Block) -> BlockState:
        """What is kept of a block."""
        return self.blocks.setdefault(block.name, BlockState())

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain Python values only."""
        plain = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("uses", "blocks")
        }
        copied = {k: dict(v) if isinstance(v, dict) else v for k, v in plain.items()}
        uses = None if self.uses is None else [tree.to_plain(use) for use in self.uses]
        blocks = {name: _block_to_plain(block) for name, block in self.blocks.items()}
        return {"version": STATE_VERSION, **copied, "uses": uses, "blocks": blocks}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], device: torch.device) -> KFACState:
        """The state again, its tensors on `device`.

        Raises:
            ValueError: it was saved by another version.
        """
        if saved.get("version") != STATE_VERSION:
            raise ValueError(
                f"K-FAC state has version {saved.get('version')}, this code reads {STATE_VERSION}: "
                "go on with the code that wrote it, or begin without its state"
            )
        values = {f.name: saved[f.name] for f in fields(cls)}
        for key in ("others", "failures", "seconds"):
            values[key] = dict(values[key])
        if saved["uses"] is not None:
            values["uses"] = dict.fromkeys(_use_from_plain(use) for use in saved["uses"])
        if values["count"] is not None:
            values["count"] = values["count"].to(device, copy=True)
        values["blocks"] = {
            name: _block_from_plain(plain, device) for name, plain in saved["blocks"].items()
        }
        return cls(**values)


def _block_to_plain(block: BlockState) -> dict[str, Any]:
    plain: dict[str, Any] = {"updates": block.updates, "shared_over": block.shared_over}
    for key in ("curvature", "inverse", "moments"):
        value = getattr(block, key)
        plain[key] = None if value is None else tree.to_plain(value)
    return plain


def _block_from_plain(plain: Mapping[str, Any], device: torch.device) -> BlockState:
    values = dict(plain)
    for key in ("curvature", "inverse", "moments"):
        if values[key] is not None:
            made = tree.from_plain(values[key], TYPES)
            values[key] = tree.mapped(lambda t: t.detach().to(device, copy=True), made)
    return BlockState(**values)


def _use_from_plain(plain: Mapping[str, Any]) -> Use:
    use: Use = tree.from_plain(plain, TYPES)
    return use


# ---- updates that could not be used: counted, logged, and ended if they go on -----------------


class KFACError(RuntimeError):
    """Training cannot go on: too many updates in a row failed."""


@dataclass(frozen=True)
class Trouble:
    """Something that went wrong in a step: a key of `KFACState.failures`, and what, in words."""

    kind: str
    message: str


def account(
    state: KFACState, troubles: Sequence[Trouble], *, updated: bool, max_failures: int
) -> None:
    """Counts the troubles of a step that has ended; an update with any is one failure in a row.

    Args:
        updated: whether the step has taken in statistics, which ends failures in a row.

    Raises:
        KFACError: `max_failures` updates in a row have failed.
    """
    if not troubles:
        if updated:
            state.failures_in_a_row = 0
        return
    for trouble in troubles:
        state.failures[trouble.kind] += 1
        logger.warning(
            "K-FAC step %d: %s; the previous ones stay in use", state.step - 1, trouble.message
        )
    state.failures_in_a_row += 1
    if state.failures_in_a_row >= max_failures:
        raise KFACError(
            f"{state.failures_in_a_row} K-FAC updates in a row failed, the last because "
            f"{troubles[-1].message}. Lower the learning rate or raise the damping (now "
            f"{state.damping:g})."
        )


def timed(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the time that a method takes to `seconds` of its object's `state`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                self.state.seconds[phase] += time.perf_counter() - start

        return call

    return decorate
