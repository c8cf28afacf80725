"""Collectives of a process group: sums over ranks, and results that one rank has for all.

Everything is packed into one flat buffer per call and dtype. Without torch.distributed every
function here does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..linalg.symmetric import Panel, mirror, panels, views
from ..tuning import PACKED_ROWS


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if _in_use() else 1


def rank() -> int:
    """This process's rank; 0 where torch.distributed is not in use."""
    return dist.get_rank() if _in_use() else 0


def gathered(value: Any) -> list[Any]:
    """What each rank has: plain Python objects."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def _in_use() -> bool:
    return dist.is_available() and dist.is_initialized()


class Reduction:
    """The sum over ranks of many tensors, under way in the background.

    Of symmetric matrices [..., d, d] little more than a triangle is sent. The tensors have their
    sums after `wait`; they must not be used before.

    Args:
        tensors: the same shapes in the same order on every rank.
        symmetric: whether each is a batch of symmetric matrices.
    """

    def __init__(self, tensors: Sequence[Tensor], symmetric: Sequence[bool]) -> None:
        self._groups: list[tuple[list[tuple[Tensor, bool]], Tensor, Any]] = []
        if world_size() == 1:
            return
        marked = list(zip(tensors, symmetric, strict=True))
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            group = [(tensor, mark) for tensor, mark in marked if tensor.dtype == dtype]
            pieces = [p for tensor, mark in group for p in _pieces(tensor, mark)]
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            self._groups.append((group, flat, dist.all_reduce(flat, async_op=True)))

    def wait(self) -> None:
        """Waits for the sums and puts them into the tensors."""
        for group, flat, work in self._groups:
            work.wait()
            start = 0
            for tensor, mark in group:
                for piece in _pieces(tensor, mark):
                    piece.copy_(flat[start : start + piece.numel()].view_as(piece))
                    start += piece.numel()
                if mark:
                    mirror(tensor, _panels(tensor))
        self._groups.clear()


def all_reduce_sums(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over all ranks, in place; one collective per dtype."""
    Reduction(tensors, [False] * len(tensors)).wait()


def _pieces(tensor: Tensor, symmetric: bool) -> list[Tensor]:
    """Views that together hold everything: the tensor, or its panels."""
    return views(tensor, _panels(tensor)) if symmetric else [tensor]


def _panels(tensor: Tensor) -> list[Panel]:
    return panels(tensor.shape[-1], PACKED_ROWS)


def broadcast_all(tensors: Sequence[Sequence[Tensor]]) -> None:
    """Fills tensors[r], on every rank, with those that rank r has; one collective for each rank.

    Args:
        tensors: for each rank its tensors, of one dtype; on other ranks their contents are
            overwritten.
    """
    if world_size() == 1:
        return
    flats = [torch.cat([tensor.reshape(-1) for tensor in own]) if own else None for own in tensors]
    works = [
        dist.broadcast(flat, src=source, async_op=True)
        for source, flat in enumerate(flats)
        if flat is not None
    ]
    for work in works:
        work.wait()
    for source, (own, flat) in enumerate(zip(tensors, flats, strict=True)):
        if flat is None or source == rank():
            continue
        start = 0
        for tensor in own:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Shares jobs out over ranks: the largest first, each to the rank with the least work so far.

    Returns:
        The rank of each job. The same on all ranks, since it depends on the costs alone.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners
