"""Reads the gradients of a part as one tensor in its canonical view, and writes them back."""

from __future__ import annotations

import torch
from torch import Tensor

from .partition import part_parameters
from .statistics import KroneckerPart, Part, UnitwisePart


def read_gradient(part: Part) -> Tensor | None:
    """The part's gradient in its canonical view, or None if any of it is missing.

    [groups, P_out, P_in (+1)] for linear layers, [1 or 2, units] for normalisation layers, the
    parameter's shape otherwise.
    """
    grads = [parameter.grad for parameter in part_parameters(part)]
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
    parameters = list(part_parameters(part))
    if isinstance(part, KroneckerPart):
        matrix = value[..., :-1] if part.has_bias else value
        values = [part.kind.from_matrix(part.module, matrix, parameters[0])]
        if part.has_bias:
            values.append(value[..., -1].reshape(parameters[1].shape))
    elif isinstance(part, UnitwisePart):
        values = [row.reshape(p.shape) for row, p in zip(value, parameters, strict=True)]
    else:
        values = [value]
    for parameter, new in zip(parameters, values, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(new)
