"""Normalisations with scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tuning import NORM_CHUNK_ELEMENTS
from ..handlers import handles
from ..operation import UnitOperation
from ..sharing import Positions, Sharing, flatten_positions, sum_rows
from ..uses import UnitUse

if TYPE_CHECKING:
    from ..record import Recording

Statistics = tuple[Tensor, Tensor]  # mean and reciprocal deviation of each channel


@dataclass(frozen=True)
class Normalisation(UnitOperation):
    """A normalisation with scale and shift.

    Attributes:
        sizes: of the output.
        function: x -> x̂.
        channels: units are the second dimension, everything behind it is shared; otherwise the
            last `trailing` dimensions.
        batch_statistics: of a BatchNorm's call: mean and reciprocal deviation, or None.
        is_batch_norm: whether x̂ is (x - mean) · deviation with these.
    """

    sizes: tuple[int, ...]
    function: Callable[[Tensor], Tensor]
    channels: bool = False
    trailing: int = 1
    batch_statistics: Statistics | None = None

    @property
    def row_dims(self) -> tuple[int, ...]:
        return (0,) if self.channels else tuple(range(len(self.sizes) - self.trailing))

    def normalised(self, x: Tensor) -> Tensor:
        return self.function(x)

    def rows(self, x: Tensor, sharing: Sharing) -> Tensor:
        if not self.channels:
            x = x.flatten(-self.trailing)
            if isinstance(sharing, Positions):
                return flatten_positions(x, sharing)
            return x.flatten(0, -2)
        if x.dim() == 2:  # BatchNorm1d on [rows, channels]
            return flatten_positions(x, sharing) if isinstance(sharing, Positions) else x
        return x.flatten(2).movedim(1, -1)

    def gradients(
        self, x: Tensor | None, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        assert x is not None
        plain = isinstance(sharing, Positions) and not sharing.is_ragged
        if self.batch_statistics is not None and x.dim() > 2 and plain:
            return _batch_norm_gradients(x.to(dtype), g.to(dtype), self.batch_statistics)
        g_rows = self.rows(g, sharing).to(dtype)
        x_rows = self.rows(self.normalised(x), sharing).to(dtype)
        return sum_rows(g_rows * x_rows, sharing), sum_rows(g_rows, sharing)


def _batch_norm_gradients(x: Tensor, g: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Σ_r g ⊙ x̂ and Σ_r g of images [N, C, ...]: [N, C] each; x̂ itself is not formed."""
    x, g = x.flatten(2), g.flatten(2)
    mean, deviation = (values.to(x.dtype) for values in statistics)
    # Not Σ g x - mean Σ g, which would cancel where the mean is large. On a CPU a few images at a
    # time, so that the difference stays in its cache.
    most = NORM_CHUNK_ELEMENTS.get(x.device.type, x.numel())
    step = max(1, most // max(1, x[:1].numel()))
    chunks = (torch.split(tensor, step) for tensor in (x, g))
    centred = [
        torch.einsum("ncl,ncl->nc", some_g, some_x - mean.unsqueeze(-1))
        for some_x, some_g in zip(*chunks, strict=True)
    ]
    return torch.cat(centred) * deviation, g.sum(-1)


def kept_statistics(y: Tensor) -> Statistics | None:
    """Those of the batch that a BatchNorm has kept for its backward pass, if its output y has any.

    Computing them again would take as long as the layer itself.
    """
    node = y.grad_fn
    if node is None or "BatchNorm" not in node.name():
        return None
    mean, deviation = (getattr(node, f"_saved_result{i}", None) for i in (1, 2))
    if not isinstance(mean, Tensor) or not isinstance(deviation, Tensor):
        return None
    return (mean, deviation) if mean.numel() == deviation.numel() == y.shape[1] else None


def _normalised(
    rec: Recording, weight: Any, bias: Any, x: Tensor, compute: Any, operation: Normalisation
) -> Any:
    use = UnitUse(rec.piece(weight), rec.piece(bias))
    if not use.pieces:
        return NotImplemented
    y = compute(x)
    if y.requires_grad:
        if operation.channels and "BatchNorm" in y.grad_fn.name() and rec.mixes_examples:
            statistics = operation.batch_statistics or kept_statistics(y)
            operation = replace(operation, batch_statistics=statistics)
        rec.add(use, operation, x, y, below=rec.nodes_below(x, weight, bias))
    return y


@handles("layer_norm", spaces=(F,))
def layer_norm(
    rec: Recording, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None,
    bias: Any = None, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Units are the trailing dimensions."""
    shape = tuple(normalized_shape)
    operation = Normalisation(
        tuple(input.shape), lambda x: F.layer_norm(x, shape, None, None, eps), trailing=len(shape)
    )
    compute = lambda x: func(x, normalized_shape, weight, bias, eps)  # noqa: E731
    return _normalised(rec, weight, bias, input, compute, operation)


@handles("rms_norm", spaces=(F, torch))
def rms_norm(
    rec: Recording, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None,
    eps: Any = None,
) -> Any:  # fmt: skip
    """Units are the trailing dimensions."""
    shape = tuple(normalized_shape)
    operation = Normalisation(
        tuple(input.shape), lambda x: F.rms_norm(x, shape, None, eps), trailing=len(shape)
    )
    compute = lambda x: func(x, normalized_shape, weight, eps)  # noqa: E731
    return _normalised(rec, weight, None, input, compute, operation)


@handles("group_norm", spaces=(F,))
def group_norm(
    rec: Recording, func: Any, input: Tensor, num_groups: int, weight: Any = None,
    bias: Any = None, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Units are channels."""
    operation = Normalisation(
        tuple(input.shape), lambda x: F.group_norm(x, num_groups, None, None, eps), channels=True
    )
    compute = lambda x: func(x, num_groups, weight, bias, eps)  # noqa: E731
    return _normalised(rec, weight, bias, input, compute, operation)


@handles("batch_norm", spaces=(F,))
def batch_norm(
    rec: Recording, func: Any, input: Tensor, running_mean: Any, running_var: Any,
    weight: Any = None, bias: Any = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Units are channels; in training the examples of a batch meet in its statistics."""
    rec.mixes_examples |= training
    mean, variance = (None, None) if training else (running_mean, running_var)
    statistics: Statistics | None = None
    if mean is not None and variance is not None:
        statistics = mean.clone(), torch.rsqrt(variance + eps)
    operation = Normalisation(
        tuple(input.shape),
        lambda x: F.batch_norm(x, mean, variance, None, None, training, 0.0, eps),
        channels=True,
        batch_statistics=statistics,
    )

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return y

    return _normalised(rec, weight, bias, input, compute, operation)


@handles("instance_norm", spaces=(F,))
def instance_norm(
    rec: Recording, func: Any, input: Tensor, running_mean: Any = None, running_var: Any = None,
    weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Units are channels."""
    mean, variance = (None, None) if use_input_stats else (running_mean, running_var)
    operation = Normalisation(
        tuple(input.shape),
        lambda x: F.instance_norm(x, mean, variance, None, None, use_input_stats, 0.0, eps),
        channels=True,
    )

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return y

    return _normalised(rec, weight, bias, input, compute, operation)
