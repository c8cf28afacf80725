"""Where inverses are computed and kept when there are several ranks (as in KAISA, Pauloski et al.
2021): memory against communication. The parameters come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from . import distributed
from .inverses import Inverse, empty_inverse
from .statistics import KroneckerPart, Part

PLACEMENTS = {
    "every_rank": "every rank computes and keeps all inverses: no communication",
    "exchanged": "each inverse is computed on one rank and sent to all, which keep it",
    "one_rank": "each inverse is computed and kept on one rank, which preconditions its layer's "
    "gradient in every step and sends the result: least memory",
}


def owners(parts: Sequence[Part], placement: str) -> dict[str, int]:
    """Layer name -> the rank that computes its inverse; empty where every rank does.

    Shared out by cost, the cubes of the factors' sides. Parts without factors are cheap enough to
    be computed everywhere.
    """
    ranks = distributed.world_size()
    if ranks == 1 or placement == "every_rank":
        return {}
    layers = [part for part in parts if isinstance(part, KroneckerPart)]
    found = distributed.assign([_cost(part) for part in layers], ranks)
    return {part.name: rank for part, rank in zip(layers, found, strict=True)}


def _cost(part: KroneckerPart) -> float:
    out_side, in_side = part.sides
    a = in_side if part.diagonal_input else in_side**3
    b = out_side if part.diagonal_gradient else out_side**3
    return float(part.kind.groups(part.module) * (a + b))


def exchange_inverses(
    parts: Sequence[KroneckerPart],
    owner: Mapping[str, int],
    found: Mapping[str, Inverse],
    kind: str,
) -> dict[str, Inverse]:
    """The inverses of all parts, on every rank, from those that each rank has found of its own.

    Args:
        parts: whose inverse was found on the rank that owns it.
        kind: see `damping.DAMPING_KINDS`.
    """
    # Row-major everywhere: products with another layout differ in the last digit, and ranks drift.
    everything = {
        part.name: {key: value.contiguous() for key, value in found[part.name].items()}
        if part.name in found
        else empty_inverse(part, kind)
        for part in parts
    }
    by_rank: list[list[Tensor]] = [[] for _ in range(distributed.world_size())]
    for part in parts:
        inverse = everything[part.name]
        by_rank[owner[part.name]] += [inverse[key] for key in sorted(inverse)]
    _broadcast(by_rank)
    return everything


def exchange_gradients(gradients: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
    """Fills in, on every rank, the preconditioned gradients that their owners have computed."""
    by_rank: list[list[Tensor]] = [[] for _ in range(distributed.world_size())]
    for name, gradient in gradients.items():
        by_rank[owner[name]].append(gradient)
    _broadcast(by_rank)


def _broadcast(by_rank: list[list[Tensor]]) -> None:
    for dtype in sorted({t.dtype for own in by_rank for t in own}, key=str):
        distributed.broadcast_all([[t for t in own if t.dtype == dtype] for own in by_rank])
