"""Normalisation layers: their scale and shift, viewed as one 2×2 problem per unit.

y = γ ⊙ x̂ + β with x̂ normalised. The would-be gradient of one example is Σ_r g ⊙ x̂ for γ and Σ_r g
for β, cheap enough to keep per example; so the GGN's unit-wise blocks (γ_i, β_i) are exact, with
no Kronecker approximation. x̂ is recomputed from the layer's input, which autograd keeps anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sharing import Positions, Sharing, flatten_positions, sum_rows, zero_padding


class NormKind(ABC):
    """The canonical view of one type of normalisation layer. Add one to `NORM_KINDS` to extend."""

    module_types: tuple[type[nn.Module], ...]

    @abstractmethod
    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        """x̂, the normalised input before scale and shift, in the shape of x."""

    @abstractmethod
    def rows(self, module: nn.Module, x: Tensor, sharing: Sharing) -> Tensor:
        """[N, R, units] for Positions, [rows, units] for Segments."""


class TrailingNormKind(NormKind):
    """LayerNorm and RMSNorm: units are the trailing dimensions, everything before is shared."""

    module_types = (nn.LayerNorm, nn.RMSNorm)

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, None, module.eps)
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)

    def rows(self, module: nn.Module, x: Tensor, sharing: Sharing) -> Tensor:
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        x = x.flatten(-len(module.normalized_shape))
        return flatten_positions(x, sharing) if isinstance(sharing, Positions) else x.flatten(0, -2)


class ChannelNormKind(NormKind):
    """BatchNorm, GroupNorm and InstanceNorm: units are channels, spatial positions are shared."""

    module_types = (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
    )

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, None, None, module.eps)
        assert isinstance(module, nn.modules.batchnorm._NormBase)
        use_batch = module.training or module.running_mean is None
        mean = None if use_batch else module.running_mean
        var = None if use_batch else module.running_var
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            return F.instance_norm(x, mean, var, None, None, use_batch, 0.0, module.eps)
        return F.batch_norm(x, mean, var, None, None, use_batch, 0.0, module.eps)

    def rows(self, module: nn.Module, x: Tensor, sharing: Sharing) -> Tensor:
        if x.dim() == 2:  # BatchNorm1d on [rows, channels]
            return flatten_positions(x, sharing) if isinstance(sharing, Positions) else x
        return x.flatten(2).movedim(1, -1)


NORM_KINDS: list[NormKind] = [TrailingNormKind(), ChannelNormKind()]


def norm_kind_of(module: nn.Module) -> NormKind | None:
    """The NormKind of a module with affine parameters, or None."""
    if getattr(module, "weight", None) is None:
        return None
    for kind in NORM_KINDS:
        for module_type in kind.module_types:
            if isinstance(module, module_type) and type(module).forward is module_type.forward:
                return kind
    return None


CHUNK_ELEMENTS = {"cpu": 1 << 18}  # by type of device; others take all at once
Statistics = tuple[Tensor, Tensor]  # mean and reciprocal deviation of each channel


def kept_statistics(y: Tensor) -> Statistics | None:
    """Those of the batch that a BatchNorm has kept for its backward pass, if its output y has any.

    Computing them again would take as long as the layer itself.
    """
    node: Any = y.grad_fn
    if node is None or "BatchNorm" not in node.name():
        return None
    found = tuple(getattr(node, f"_saved_result{i}", None) for i in (1, 2))
    mean, deviation = found
    if not isinstance(mean, Tensor) or not isinstance(deviation, Tensor):
        return None
    return (mean, deviation) if mean.numel() == deviation.numel() == y.shape[1] else None


def example_gradients(
    kind: NormKind,
    module: nn.Module,
    x: Tensor,
    g: Tensor,
    sharing: Sharing,
    dtype: torch.dtype,
    statistics: Statistics | None = None,
) -> Tensor:
    """Would-be gradients of (γ, β), or of γ alone, of each example: [1 or 2, N, units].

    `statistics` are those of the batch in a BatchNorm's call, where they are known.
    """
    images = isinstance(module, nn.modules.batchnorm._BatchNorm) and x.dim() > 2
    if images and isinstance(sharing, Positions) and not sharing.is_ragged:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        x, g = x.detach().to(dtype), g.to(dtype)
        scale, shift = _batch_norm_gradients(module, x, g, statistics)
    else:
        x_hat = kind.normalized(module, x.detach())
        g_rows = kind.rows(module, g, sharing).to(dtype)
        x_rows = kind.rows(module, x_hat, sharing).to(dtype)
        scale, shift = sum_rows(g_rows * x_rows, sharing), sum_rows(g_rows, sharing)
    if getattr(module, "bias", None) is None:
        return scale.unsqueeze(0)
    return torch.stack([scale, shift])


def row_gradients(
    kind: NormKind, module: nn.Module, x: Tensor, g: Tensor, sharing: Sharing, dtype: torch.dtype
) -> Tensor:
    """Would-be gradients of (γ, β), or of γ alone, at each position: [1 or 2, rows, units]."""
    x_rows = kind.rows(module, kind.normalized(module, x.detach()), sharing).to(dtype)
    g_rows = zero_padding(kind.rows(module, g, sharing).to(dtype), sharing)
    gradients = [zero_padding(g_rows * x_rows, sharing), g_rows]
    kept = gradients[: 1 if getattr(module, "bias", None) is None else 2]
    return torch.stack([rows.flatten(0, -2) for rows in kept])


def _batch_norm_gradients(
    module: nn.modules.batchnorm._BatchNorm, x: Tensor, g: Tensor, statistics: Statistics | None
) -> tuple[Tensor, Tensor]:
    """Σ_r g ⊙ x̂ and Σ_r g of images [N, C, ...]: [N, C] each; x̂ itself is not formed."""
    x, g = x.flatten(2), g.flatten(2)
    use_batch = module.training or module.running_mean is None
    if not use_batch:
        assert module.running_mean is not None
        assert module.running_var is not None
        statistics = module.running_mean, (module.running_var + module.eps).rsqrt()
    elif statistics is None:
        variance, mean = torch.var_mean(x, (0, 2), correction=0)
        statistics = mean, (variance + module.eps).rsqrt()
    mean, deviation = (values.to(x.dtype) for values in statistics)
    # Not Σ g x - mean Σ g, which would cancel where the mean is large. On a CPU a few images at a
    # time, so that the difference stays in its cache.
    most = CHUNK_ELEMENTS.get(x.device.type, x.numel())
    chunks = (tensor.split(max(1, most // max(1, x[:1].numel()))) for tensor in (x, g))
    centred = [
        torch.einsum("ncl,ncl->nc", some_g, some_x - mean.unsqueeze(-1))
        for some_x, some_g in zip(*chunks, strict=True)
    ]
    return torch.cat(centred) * deviation, g.sum(-1)
