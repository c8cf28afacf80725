"""Assigns every trainable parameter of a model to exactly one part of the curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .layers import kind_of
from .norms import norm_kind_of
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


def partition(
    model: nn.Module, *, approx: str, joint_bias: bool, max_factor_side: int
) -> Partition:
    """Splits the trainable parameters of an (unwrapped) model into parts.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    uses = _count_uses(model)
    parts: list[Part] = []
    reasons: dict[str, str] = {}
    claimed: set[int] = set()
    for name, module in model.named_modules():
        part, reason = _layer_part(name, module, uses, approx, joint_bias, max_factor_side)
        if part is not None:
            parts.append(part)
            claimed.update(id(p) for p in module.parameters(recurse=False) if p.requires_grad)
            if isinstance(part, UnitwisePart):
                reasons[name] = "normalisation layer: exact unit-wise blocks"
        elif reason is not None:
            for parameter_name, _ in module.named_parameters(recurse=False):
                reasons[f"{name}.{parameter_name}" if name else parameter_name] = reason
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in claimed:
            parts.append(DiagonalPart(name, parameter))
            reasons.setdefault(name, "parameter outside the supported layers")
    if not parts:
        raise ValueError("the model has no trainable parameter")
    present = {part.name for part in parts}
    return Partition(tuple(parts), {k: v for k, v in reasons.items() if k in present})


def _count_uses(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> number of modules that hold it."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _layer_part(
    name: str,
    module: nn.Module,
    uses: dict[int, int],
    approx: str,
    joint_bias: bool,
    max_factor_side: int,
) -> tuple[Part | None, str | None]:
    """The part that a module is, or why it is none (None, None for containers)."""
    own = [p for p in module._parameters.values() if p is not None]
    if not own:
        return None, None
    kind, norm_kind = kind_of(module), norm_kind_of(module)
    if kind is None and norm_kind is None:
        return None, f"{type(module).__name__} is not a supported layer"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return None, "its weight is computed from other parameters (parametrisation)"
    if not all(p.requires_grad for p in own):
        return None, "weight or bias of the layer is frozen"
    if any(uses[id(p)] > 1 for p in own):
        return None, "parameter shared with another module"
    if norm_kind is not None:
        return UnitwisePart(name, module, norm_kind, bias is not None), None
    assert kind is not None
    reason = kind.unsupported(module)
    if reason is not None:
        return None, reason
    has_bias = bias is not None
    out_side, in_side = kind.sides(module)
    in_side += int(has_bias)
    one_hot = kind.one_hot_inputs and (approx == "expand" or in_side > max_factor_side)
    return (
        KroneckerPart(
            name=name,
            module=module,
            kind=kind,
            approx=approx,
            has_bias=has_bias,
            joint_bias=joint_bias,
            diagonal_input=one_hot or in_side > max_factor_side,
            diagonal_gradient=out_side > max_factor_side,
        ),
        None,
    )


def part_parameters(part: Part) -> Iterator[nn.Parameter]:
    """The parameters of a part: weight, then bias."""
    if isinstance(part, DiagonalPart):
        yield part.parameter
        return
    for name in ("weight", "bias") if part.has_bias else ("weight",):
        parameter = part.module._parameters[name]
        assert parameter is not None
        yield parameter


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
        for suffix, parameter in zip(("weight", "bias"), part_parameters(part), strict=False):
            name = f"{part.name}.{suffix}" if part.name else suffix
            parts.append(DiagonalPart(name, parameter))
            reasons[name] = f"{type(part.module).__name__} '{part.name}' was not called as a module"
    return Partition(tuple(parts), reasons)
