"""Reads the gradients of a part as one tensor in its canonical view, and writes them back."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import KroneckerPart, Part, UnitwisePart


def read_gradient(part: Part) -> Tensor | None:
    """The part's gradient in its canonical view, or None if any of it is missing.

    [groups, P_out, P_in (+1)] for linear layers, [1 or 2, units] for normalisation layers, the
    parameter's shape otherwise.
    """
    grads = [piece.grad for piece in part.slices]
    if any(grad is None or grad.is_sparse for grad in grads):
        return None
    first = grads[0]
    assert first is not None
    if isinstance(part, KroneckerPart):
        matrix = part.kind.to_matrix(part.module, first)
        if not part.has_bias:
            return matrix
        bias = grads[1]
        assert bias is not None
        return torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], -1)
    if isinstance(part, UnitwisePart):
        return torch.stack([grad.flatten() for grad in grads if grad is not None])
    return first


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
