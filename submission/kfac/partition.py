"""Assigns every trainable parameter of a model to exactly one part of the curvature."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .fused import fused_of
from .layers import EmbeddingKind, Kind, LinearKind, kind_of
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
    bias: str
    by_position: bool
    max_factor_side: int
    exclude: tuple[str, ...]


def partition(
    model: nn.Module,
    *,
    approx: str,
    max_factor_side: int,
    bias: str = "joint",
    norm_rows: str = "examples",
    exclude: tuple[str, ...] = (),
) -> Partition:
    """Splits the trainable parameters of an (unwrapped) model into parts.

    Args:
        exclude: names of modules; their layers, and those inside them, are not K-FAC layers.

    Raises:
        ValueError: the model has no trainable parameter, a parameter has no shape yet, or a
            module to exclude does not exist.
    """
    options = _Options(approx, bias, norm_rows == "positions", max_factor_side, exclude)
    modules = dict(model.named_modules())
    for key in exclude:
        if key not in modules:
            near = difflib.get_close_matches(key, modules, n=3)
            raise ValueError(
                f"exclude names '{key}', which is no module of the model"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    holders = _holders(model)
    parts: list[Part] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        found, reason = _parts_of(name, module, holders, options)
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
            holding = holders[id(parameter)]
            sparse = any(getattr(module, "sparse", False) is True for module in holding)
            parts.append(diagonal_part(name, parameter, max_factor_side, sparse))
            reasons.setdefault(name, "parameter outside the supported layers")
    if not parts:
        raise ValueError("the model has no trainable parameter")
    present = {part.name for part in parts}
    return Partition(tuple(parts), {k: v for k, v in reasons.items() if k in present})


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """id of a parameter -> the modules that hold it, in order."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    return holders


def _parts_of(
    name: str, module: nn.Module, holders: dict[int, list[nn.Module]], options: _Options
) -> tuple[list[Part], str | None]:
    """The parts that a module is, and why it (or what it is) is not a K-FAC layer."""
    own = {key: p for key, p in module._parameters.items() if p is not None}
    if not own:
        return [], None
    if any(isinstance(p, UninitializedParameter) for p in own.values()):
        raise ValueError(
            f"layer '{name}' ({type(module).__name__}) has no shape yet: run one forward pass "
            "before making K-FAC"
        )
    if any(p.is_complex() for p in own.values()):
        return [], "complex parameters"
    if any(p.numel() == 0 for p in own.values()):
        return [], "parameters without entries"
    if any(name == key or name.startswith(key + ".") for key in options.exclude):
        return [], "excluded"
    if not all(p.requires_grad for p in own.values()):
        return [], "weight or bias of the layer is frozen"
    sharers = {id(m): m for p in own.values() for m in holders[id(p)] if m is not module}
    if sharers:
        return _shared_parts(name, module, list(sharers.values()), holders, options)
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
    slices = _slices(name, module)
    if norm_kind is not None:
        how = "unit-wise blocks by position" if options.by_position else "exact unit-wise blocks"
        reason = f"normalisation layer: {how}"
        return [UnitwisePart(name, module, norm_kind, slices, options.by_position)], reason
    assert kind is not None
    reason = kind.unsupported(module)
    if reason is not None:
        return [], reason
    return [_kronecker_part(name, module, kind, slices, options)], None


def _shared_parts(
    name: str,
    module: nn.Module,
    others: list[nn.Module],
    holders: dict[int, list[nn.Module]],
    options: _Options,
) -> tuple[list[Part], str | None]:
    """A layer whose parameters other modules hold as well.

    Modules of one kind with all parameters in common are one layer with more calls; an embedding
    and a linear layer with a common weight are a tied layer. Everything else is not handled.
    """
    kind = kind_of(module)
    kinds = [kind_of(other) for other in others]
    own = module._parameters
    if kind is not None and all(k is kind for k in kinds):
        reason = next((r for m in (module, *others) if (r := kind.unsupported(m))), None)
        if reason is not None:
            return [], reason
        if all(_same_parameters(module, m) and kind.is_alike(module, m) for m in others):
            if module is not next(m for m in holders[id(own["weight"])]):
                return [], None  # counted with the first of them
            slices = _slices(name, module)
            return [_kronecker_part(name, module, kind, slices, options, tuple(others))], None
    elif isinstance(kind, LinearKind) and len(others) == 1:
        (other,) = others
        if (
            isinstance(other, nn.Embedding)
            and isinstance(kinds[0], EmbeddingKind)
            and own["weight"] is other.weight
            and not kinds[0].unsupported(other)
        ):
            part = _kronecker_part(name, module, kind, _slices(name, module), options)
            if not part.diagonal_input:
                return [replace(part, embedding=other)], None
    elif isinstance(kind, EmbeddingKind) and len(others) == 1 and kinds[0] is not None:
        found, _ = _shared_parts("", others[0], [module], holders, options)
        if found:
            return [], None  # counted with the linear layer
    return [], "parameter shared with another module in a way that is not handled"


def _same_parameters(module: nn.Module, other: nn.Module) -> bool:
    a, b = module._parameters, other._parameters
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


def _slices(name: str, module: nn.Module) -> tuple[ParameterSlice, ...]:
    """Weight and bias of a layer, the bias where there is one."""
    found = ((key, module._parameters.get(key)) for key in ("weight", "bias"))
    return tuple(ParameterSlice(_join(name, key), p) for key, p in found if p is not None)


def _view_slices(view: LinearView) -> tuple[ParameterSlice, ...]:
    return tuple(s for s in (view.weight_slice, view.bias_slice) if s is not None)


def _kronecker_part(
    name: str,
    module: Any,
    kind: Kind,
    slices: tuple[ParameterSlice, ...],
    options: _Options,
    also: tuple[nn.Module, ...] = (),
) -> KroneckerPart:
    out_side, in_side = kind.sides(module)
    in_side += len(slices) > 1 and options.bias != "output"
    too_wide = in_side > options.max_factor_side
    return KroneckerPart(
        name=name,
        module=module,
        kind=kind,
        approx=options.approx,
        slices=slices,
        bias=options.bias,
        diagonal_input=too_wide or kind.keeps_diagonal_input(module, options.approx),
        diagonal_gradient=out_side > options.max_factor_side,
        also=also,
    )


def diagonal_part(
    name: str, parameter: nn.Parameter, max_factor_side: int, sparse: bool = False
) -> DiagonalPart:
    """A parameter with the diagonal of its GGN, by row where it is larger than a factor may be."""
    too_large = parameter.dim() > 1 and parameter.numel() > max_factor_side**2
    return DiagonalPart(name, parameter, by_row=too_large, sparse=sparse)


def demote_uncalled(
    partition: Partition, uncalled: Collection[str], max_factor_side: int
) -> Partition:
    """Turns layers whose forward was never called into parameters with a diagonal curvature.

    Such a layer's weight is used some other way (functionally, or in a fused operation), which
    hooks do not see, or was not needed so far; its parameters still train.

    Args:
        uncalled: names of the layers.
        max_factor_side: as in `partition`.
    """
    parts: list[Part] = [part for part in partition.parts if part.name not in uncalled]
    reasons = dict(partition.reasons)
    for part in partition.parts:
        if part.name not in uncalled or isinstance(part, DiagonalPart):
            continue
        reasons.pop(part.name, None)
        for piece in part.slices:
            if piece.name not in reasons:  # the rows of one parameter come back together
                parts.append(diagonal_part(piece.name, piece.parameter, max_factor_side))
                reasons[piece.name] = f"'{part.name}' has not been called as a module so far"
    return Partition(tuple(parts), reasons)
