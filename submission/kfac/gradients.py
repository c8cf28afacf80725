"""Reads the gradients of a part as one tensor in its canonical view, and writes them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import KroneckerPart, Part, UnitwisePart, as_real


def canonical(part: Part, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors of the shapes of a part's slices as one, or None if all are missing.

    A missing one among others counts as zeros; sparse gradients cannot be had as one.

    [groups, P_out, P_in (+1)] for linear layers, [1 or 2, units] for normalisation layers, the
    parameter's shape otherwise; complex ones as pairs of real numbers, see `as_real`.
    """
    if all(t is None for t in tensors) or any(t is not None and t.is_sparse for t in tensors):
        return None
    given = [
        torch.zeros_like(piece.data) if tensor is None else tensor
        for tensor, piece in zip(tensors, part.slices, strict=True)
    ]
    if isinstance(part, KroneckerPart):
        matrix = part.kind.to_matrix(part.module, given[0])
        if not part.has_bias:
            return matrix
        return torch.cat([matrix, given[1].reshape(*matrix.shape[:2], 1)], -1)
    if isinstance(part, UnitwisePart):
        return torch.stack([tensor.flatten() for tensor in given])
    return as_real(given[0])


def read_gradient(part: Part) -> Tensor | None:
    """The part's gradient in its canonical view, or None if it has none."""
    return canonical(part, [piece.grad for piece in part.slices])


def write_gradients(parts: Sequence[Part], values: Sequence[Tensor]) -> None:
    """Writes tensors in the canonical view into the `.grad` of the parts' parameters."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for part, value in zip(parts, values, strict=True):
        for piece, new in zip(part.slices, _as_slices(part, value), strict=True):
            if piece.grad is not None:
                target = as_real(piece.grad)
                targets.append(target)
                # Of the target's own type: the fused copy looks at the types of one side only.
                sources.append(new.to(target.dtype))
    if targets:
        torch._foreach_copy_(targets, sources)


def _as_slices(part: Part, value: Tensor) -> list[Tensor]:
    """The inverse of `canonical`."""
    shapes = [piece.data for piece in part.slices]
    if isinstance(part, KroneckerPart):
        matrix = value[..., :-1] if part.has_bias else value
        values = [part.kind.from_matrix(part.module, matrix, shapes[0])]
        if part.has_bias:
            values.append(value[..., -1].reshape(shapes[1].shape))
        return values
    if isinstance(part, UnitwisePart):
        return [row.reshape(shape.shape) for row, shape in zip(value, shapes, strict=True)]
    return [value]
