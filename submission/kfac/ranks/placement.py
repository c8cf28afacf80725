"""Where inverses are computed and kept when there are several ranks (as in KAISA, Pauloski et al.
2021): memory against communication. The parameters come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linalg import tree
from . import collectives

PLACEMENTS = {
    "every_rank": "every rank computes and keeps all inverses: no communication",
    "exchanged": "each inverse is computed on one rank and sent to all, which keep it",
    "one_rank": "each inverse is computed and kept on one rank, which preconditions its block's "
    "gradient in every step and sends the result: least memory",
}


def turns_of(costs: Mapping[str, float], interval: int) -> dict[str, int]:
    """Name of a block -> the step of an interval in which its inverse is renewed.

    Of about equal cost, and the same for any number of ranks.

    Args:
        costs: of the inverses of blocks.
    """
    return dict(zip(costs, collectives.assign(list(costs.values()), interval), strict=True))


def owners(
    costs: Mapping[str, float], placement: str, turns: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Name of a block -> the rank that computes its inverse; empty where every rank does.

    Args:
        costs: of the inverses of blocks with factors; others are cheap enough to be made
            everywhere.
        turns: name -> the step of an interval in which it is made; those of one step are shared
            out over ranks by themselves. None for one step.
    """
    ranks = collectives.world_size()
    if ranks == 1 or placement == "every_rank":
        return {}
    of_turn: dict[int, list[str]] = {}
    for name in costs:
        of_turn.setdefault(0 if turns is None else turns[name], []).append(name)
    found: dict[str, int] = {}
    loads = [0.0] * ranks  # of all turns so far
    for names in of_turn.values():
        own = collectives.assign([costs[name] for name in names], ranks)
        # Who had most in other turns has least in this one.
        parts = [sum(costs[n] for n, part in zip(names, own, strict=True) if part == i)
                 for i in range(ranks)]  # fmt: skip
        by_load = sorted(range(ranks), key=loads.__getitem__)
        largest_first = sorted(range(ranks), key=lambda part: -parts[part])
        rank_of = dict(zip(largest_first, by_load, strict=True))
        for name, part in zip(names, own, strict=True):
            found[name] = rank_of[part]
            loads[rank_of[part]] += costs[name]
    return {name: found[name] for name in costs}


def exchange_inverses(
    names: Sequence[str], owner: Mapping[str, int], found: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """The inverses of all blocks, on every rank, from those that each rank has made of its own.

    Args:
        names: blocks whose inverse was found on the rank that owns it.
        found: name -> inverse, of this rank's.
        device: of the tensors.
    """
    # What the others' inverses look like: types and shapes, without the tensors.
    mine = {
        name: tree.mapped(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), found[name])
        for name in names
        if owner[name] == collectives.rank()
    }
    shapes = collectives.gathered(mine)
    everything: dict[str, Any] = {}
    by_rank: list[list[Tensor]] = [[] for _ in shapes]
    for name in names:
        source = owner[name]
        if source == collectives.rank():
            # Row-major everywhere: products with another layout differ in the last digit, and
            # ranks drift apart.
            inverse = tree.mapped(lambda t: t.contiguous(), found[name])
        else:
            inverse = tree.mapped(
                lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), shapes[source][name]
            )
        everything[name] = inverse
        by_rank[source] += tree.leaves(inverse).values()
    _broadcast(by_rank)
    return everything


def exchange_gradients(gradients: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
    """Fills in, on every rank, the preconditioned gradients that their owners have computed."""
    by_rank: list[list[Tensor]] = [[] for _ in range(collectives.world_size())]
    for name, gradient in gradients.items():
        by_rank[owner[name]].append(gradient)
    _broadcast(by_rank)


def _broadcast(by_rank: list[list[Tensor]]) -> None:
    for dtype in sorted({t.dtype for own in by_rank for t in own}, key=str):
        collectives.broadcast_all([[t for t in own if t.dtype == dtype] for own in by_rank])
