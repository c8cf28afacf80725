"""Reads the gradients of a part as one tensor in its canonical view, and writes them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import KroneckerPart, Part, UnitwisePart


def canonical(part: Part, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors of the shapes of a part's slices as one, or None if any of them is missing.

    [groups, P_out, P_in (+1)] for linear layers, [1 or 2, units] for normalisation layers, the
    parameter's shape otherwise.
    """
    given = [tensor for tensor in tensors if tensor is not None and not tensor.is_sparse]
    if len(given) < len(tensors):
        return None
    if isinstance(part, KroneckerPart):
        matrix = part.kind.to_matrix(part.module, given[0])
        if not part.has_bias:
            return matrix
        return torch.cat([matrix, given[1].reshape(*matrix.shape[:2], 1)], -1)
    if isinstance(part, UnitwisePart):
        return torch.stack([tensor.flatten() for tensor in given])
    return given[0]


def read_gradient(part: Part) -> Tensor | None:
    """The part's gradient in its canonical view, or None if any of it is missing."""
    return canonical(part, [piece.grad for piece in part.slices])


def write_gradient(part: Part, value: Tensor) -> None:
    """Writes a tensor in the canonical view into the `.grad` of the part's parameters."""
    shapes = [piece.data for piece in part.slices]
    if isinstance(part, KroneckerPart):
        matrix = value[..., :-1] if part.has_bias else value
        values = [part.kind.from_matrix(part.module, matrix, shapes[0])]
        if part.has_bias:
            values.append(value[..., -1].reshape(shapes[1].shape))
    elif isinstance(part, UnitwisePart):
        values = [row.reshape(shape.shape) for row, shape in zip(value, shapes, strict=True)]
    else:
        values = [value]
    for piece, new in zip(part.slices, values, strict=True):
        grad = piece.grad
        assert grad is not None
        grad.copy_(new)
