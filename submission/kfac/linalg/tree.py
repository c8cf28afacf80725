"""Objects of tensors: dataclasses whose fields are tensors, other such objects, or plain values.

Factors, inverses and moments are such objects. Here they become flat for what treats all of them
alike: joining blocks of equal shape, collectives, saving and restoring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def leaves(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Path of fields -> tensor, in the order of the fields."""
    found: dict[str, Tensor] = {}
    for field in fields(tree):
        value = getattr(tree, field.name)
        if isinstance(value, Tensor):
            found[prefix + field.name] = value
        elif is_dataclass(value):
            found.update(leaves(value, f"{prefix}{field.name}."))
    return found


def with_leaves(tree: Any, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The same object with other tensors at the paths of `leaves`."""
    new: dict[str, Any] = {}
    for field in fields(tree):
        value = getattr(tree, field.name)
        if isinstance(value, Tensor):
            new[field.name] = tensors[prefix + field.name]
        elif is_dataclass(value):
            new[field.name] = with_leaves(value, tensors, f"{prefix}{field.name}.")
    return replace(tree, **new)


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same object with `function` applied to each tensor."""
    return with_leaves(tree, {path: function(tensor) for path, tensor in leaves(tree).items()})


def form(tree: Any) -> Any:
    """What is left without the tensors: types and plain values. Equal for objects that can be
    joined."""
    parts: list[Any] = [type(tree).__name__]
    for field in fields(tree):
        value = getattr(tree, field.name)
        if is_dataclass(value):
            parts.append(form(value))
        else:
            parts.append(Tensor.__name__ if isinstance(value, Tensor) else value)
    return tuple(parts)


def write(tree: Any, new: Any) -> bool:
    """Writes the tensors of another object into those of this one, if it has the same form.

    Returns:
        Whether it has.
    """
    own, others = leaves(tree), leaves(new)
    same = form(tree) == form(new) and all(
        (own[path].shape, own[path].dtype) == (other.shape, other.dtype)
        for path, other in others.items()
    )
    if same:
        for path, other in others.items():
            own[path].copy_(other)
    return same


def storages(tree: Any) -> set[int]:
    """The memory that its tensors are in."""
    return {tensor.untyped_storage().data_ptr() for tensor in leaves(tree).values()} - {0}


def to_plain(tree: Any) -> dict[str, Any]:
    """Tensors and plain values only, with the names of the types."""
    plain: dict[str, Any] = {"type": type(tree).__name__}
    for field in fields(tree):
        value = getattr(tree, field.name)
        plain[field.name] = to_plain(value) if is_dataclass(value) else value
    return plain


def from_plain(plain: Mapping[str, Any], types: Mapping[str, type[Any]]) -> Any:
    """The object again.

    Args:
        types: name of a type -> type, of all that may occur.
    """

    def restored(value: Any) -> Any:
        if isinstance(value, Mapping):
            return from_plain(value, types)
        return tuple(value) if isinstance(value, list) else value

    values = {key: restored(value) for key, value in plain.items() if key != "type"}
    return types[plain["type"]](**values)
