"""Blocks of equal shape, worked on together: one batched product in place of many small ones.

The tensors of a batch lie side by side; those that the state keeps for each block become views of
them, so that nothing is held twice and a checkpoint knows nothing of batches. Large blocks stay
alone: one product of theirs fills the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..linalg import tree
from .block import Block

Layout = tuple[tuple[int, ...], int]


@dataclass(eq=False)
class Batch:
    """Blocks whose tensors are joined.

    Attributes:
        blocks: one, or several of equal shape.
        layout: (shape, dim): gradients are reshaped to `shape` (-1 for the rest) and joined along
            `dim`; None for a single block, whose tensors stay as they are.
        object: what was joined (an inverse, a basis), or None.
    """

    blocks: tuple[Block, ...]
    layout: Layout | None
    object: Any

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the blocks, in their canonical views, as one."""
        if self.layout is None:
            return tensors[0]
        shape, dim = self.layout
        return torch.cat([tensor.reshape(shape) for tensor in tensors], dim)

    def separate(self, joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of a joined tensor in the shapes of the blocks' tensors."""
        if self.layout is None:
            return [joined]
        dim = self.layout[1]
        unit = joined.numel() // joined.shape[dim]
        pieces = torch.split(joined, [tensor.numel() // unit for tensor in like], dim)
        return [piece.reshape(t.shape) for piece, t in zip(pieces, like, strict=True)]


def make_batches(
    blocks: Sequence[Block],
    objects: Mapping[str, Any],
    put: Callable[[str, Any], None],
    like: Callable[[Block], Tensor],
) -> list[Batch]:
    """Joins blocks of equal shape whose objects have equal forms.

    Args:
        objects: name -> a tree of tensors, or None.
        put: is given the names of joined blocks and their objects as views.
        like: an empty tensor of the dtype and device of a block's parameters.
    """
    found: dict[object, list[Block]] = {}
    for block in blocks:
        found.setdefault(_key(block, objects.get(block.name), like(block)), []).append(block)
    return [_joined(same, objects, put) for same in found.values()]


def _key(block: Block, own: Any, like: Tensor) -> object:
    """Blocks with the same key are joined."""
    device = like.device
    limit = tuning.LARGEST_BATCHED_ENTRIES.get(
        device.type, tuning.LARGEST_BATCHED_ENTRIES_ELSEWHERE
    )
    shape, dim = block.layout
    leaves = {} if own is None else tree.leaves(own)
    by_row = shape[0] == 1 and dim and any(len(leaf) != 1 for leaf in leaves.values())
    if by_row or sum(piece.numel for piece in block.pieces) > limit:
        return block.name
    if own is None:
        return (1, -1), 1, like.dtype, device
    tensors = tuple(
        (path, leaf.dtype, leaf.shape[:dim], leaf.shape[dim + 1 :]) for path, leaf in leaves.items()
    )
    return shape, dim, like.dtype, device, tree.form(own), tensors


def _joined(
    blocks: list[Block], objects: Mapping[str, Any], put: Callable[[str, Any], None]
) -> Batch:
    own = [objects.get(block.name) for block in blocks]
    if len(blocks) == 1:
        return Batch((blocks[0],), None, own[0])
    if own[0] is None:
        return Batch(tuple(blocks), ((1, -1), 1), None)
    layout = blocks[0].layout
    dim = layout[1]
    leaves = [tree.leaves(one) for one in own]
    joined: dict[str, Tensor] = {}
    views: list[dict[str, Tensor]] = [{} for _ in own]
    for path in leaves[0]:
        lengths = [tensors[path].shape[dim] for tensors in leaves]
        joined[path] = torch.cat([tensors[path] for tensors in leaves], dim)
        for mine, view in zip(views, torch.split(joined[path], lengths, dim), strict=True):
            mine[path] = view
    for block, one, mine in zip(blocks, own, views, strict=True):
        put(block.name, tree.with_leaves(one, mine))
    return Batch(tuple(blocks), layout, tree.with_leaves(own[0], joined))
