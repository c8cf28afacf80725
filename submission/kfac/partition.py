"""Assigns every trainable parameter of a model to exactly one part of the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .fused import fused_of
from .layers import Kind, LinearKind, kind_of
from .norms import norm_kind_of
from .parameters import LinearView, ParameterSlice
from .statistics import DiagonalPart, KroneckerPart, Part, UnitwisePart


@dataclass(frozen=True)
class Partition:
    """The parts of a model, and why some parameters are in none of the layers.

    Attributes:
        parts: in the order of the model's modules; parameters outside layers last.
        reasons: part name -> why it is not in a K-FAC layer, for parts that are not.
    """

    parts: tuple[Part, ...]
    reasons: dict[str, str]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(frozen=True)
class _Options:
    approx: str
    joint_bias: bool
    max_factor_side: int


def partition(
    model: nn.Module, *, approx: str, joint_bias: bool, max_factor_side: int
) -> Partition:
    """Splits the trainable parameters of an (unwrapped) model into parts.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    options = _Options(approx, joint_bias, max_factor_side)
    uses = _count_uses(model)
    parts: list[Part] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        found, reason = _parts_of(name, module, uses, options)
        parts += found
        if reason is not None:
            covered = (
                [part.name for part in found]
                if found
                else [_join(name, own) for own, _ in module.named_parameters(recurse=False)]
            )
            reasons.update(dict.fromkeys(covered, reason))
    claimed = {id(piece.parameter) for part in parts for piece in part.slices}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in claimed:
            parts.append(DiagonalPart(name, parameter))
            reasons.setdefault(name, "parameter outside the supported layers")
    if not parts:
        raise ValueError("the model has no trainable parameter")
    present = {part.name for part in parts}
    return Partition(tuple(parts), {k: v for k, v in reasons.items() if k in present})


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _count_uses(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> number of modules that hold it."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _parts_of(
    name: str, module: nn.Module, uses: dict[int, int], options: _Options
) -> tuple[list[Part], str | None]:
    """The parts that a module is, and why it (or what it is) is not a K-FAC layer."""
    own = {key: p for key, p in module._parameters.items() if p is not None}
    if not own:
        return [], None
    if not all(p.requires_grad for p in own.values()):
        return [], "weight or bias of the layer is frozen"
    if any(uses[id(p)] > 1 for p in own.values()):
        return [], "parameter shared with another module"
    fused = fused_of(module)
    if fused is not None:
        reason = fused.unsupported(module)
        if reason is not None:
            return [], reason
        views = fused.views(module, _join(name, ""))
        parts: list[Part] = [
            _kronecker_part(_join(name, key), view, LinearKind(), _view_slices(view), options)
            for key, view in views.items()
        ]
        return parts, None
    kind, norm_kind = kind_of(module), norm_kind_of(module)
    if kind is None and norm_kind is None:
        return [], f"{type(module).__name__} is not a supported layer"
    if "weight" not in own:
        return [], "its weight is computed from other parameters (parametrisation)"
    slices = tuple(
        ParameterSlice(_join(name, key), own[key]) for key in ("weight", "bias") if key in own
    )
    if norm_kind is not None:
        reason = "normalisation layer: exact unit-wise blocks"
        return [UnitwisePart(name, module, norm_kind, slices)], reason
    assert kind is not None
    reason = kind.unsupported(module)
    if reason is not None:
        return [], reason
    return [_kronecker_part(name, module, kind, slices, options)], None


def _view_slices(view: LinearView) -> tuple[ParameterSlice, ...]:
    return tuple(s for s in (view.weight_slice, view.bias_slice) if s is not None)


def _kronecker_part(
    name: str,
    module: Any,
    kind: Kind,
    slices: tuple[ParameterSlice, ...],
    options: _Options,
) -> KroneckerPart:
    out_side, in_side = kind.sides(module)
    in_side += len(slices) - 1
    too_wide = in_side > options.max_factor_side
    return KroneckerPart(
        name=name,
        module=module,
        kind=kind,
        approx=options.approx,
        slices=slices,
        joint_bias=options.joint_bias,
        diagonal_input=too_wide or (kind.one_hot_inputs and options.approx == "expand"),
        diagonal_gradient=out_side > options.max_factor_side,
    )


def demote_uncalled(partition: Partition, calls: Mapping[str, int]) -> Partition:
    """Turns layers whose forward was never called into parameters with a diagonal curvature.

    Such a layer's weight is used some other way (functionally, or in a fused operation), which
    hooks do not see; its parameters still train.

    Args:
        calls: part name -> number of calls in a recorded forward pass; parts not in it stay.
    """
    uncalled = {name for name, count in calls.items() if count == 0}
    parts: list[Part] = [part for part in partition.parts if part.name not in uncalled]
    reasons = dict(partition.reasons)
    for part in partition.parts:
        if part.name not in uncalled or isinstance(part, DiagonalPart):
            continue
        reasons.pop(part.name, None)
        for piece in part.slices:
            if piece.name not in reasons:  # the rows of one parameter come back together
                parts.append(DiagonalPart(piece.name, piece.parameter))
                reasons[piece.name] = f"'{part.name}' was not called as a module"
    return Partition(tuple(parts), reasons)
