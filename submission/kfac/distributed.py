"""Sums over the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if _in_use() else 1


def rank() -> int:
    """This process's rank; 0 where torch.distributed is not in use."""
    return dist.get_rank() if _in_use() else 0


def _in_use() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_reduce_sums(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all ranks, in place; one collective per dtype."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        start = 0
        for tensor in group:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
