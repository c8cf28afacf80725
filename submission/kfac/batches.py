"""Parts of equal shape, worked on together: one batched product in place of many small ones.

The tensors of a batch lie side by side; those that the state keeps for each part become views of
them, so that nothing is held twice and a checkpoint knows nothing of batches. Large parts stay
alone: one product of theirs fills the device.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .statistics import DiagonalPart, KroneckerPart, Part, UnitwisePart

# Gradients of more entries are worked on alone, by type of device. A CPU is full at about 180×180.
LARGEST_ENTRIES = {"cpu": 1 << 15}
LARGEST_ENTRIES_ELSEWHERE = 1 << 20

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How parts lie side by side: reshaped to `shape` (-1 for the rest), joined along `dim`."""

    shape: tuple[int, ...]
    dim: int


@dataclass(eq=False)
class Batch:
    """Parts whose tensors are joined.

    Attributes:
        parts: one, or several of equal shape.
        layout: of gradients and moments; None for a single part, whose tensors stay as they are.
        tensors: those of the parts (inverses, bases), joined, by name.
        moments: what a rule keeps from step to step, joined; see `keep`.
    """

    parts: tuple[Part, ...]
    layout: Layout | None
    tensors: Tensors
    moments: Tensors = field(default_factory=dict)

    def join(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of the parts, in their canonical views, as one tensor."""
        if self.layout is None:
            return gradients[0]
        layout = self.layout
        return torch.cat([gradient.reshape(layout.shape) for gradient in gradients], layout.dim)

    def separate(self, joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of a joined tensor in the shapes of the parts' gradients."""
        if self.layout is None:
            return [joined]
        dim = self.layout.dim
        unit = joined.numel() // joined.shape[dim]
        pieces = torch.split(joined, [tensor.numel() // unit for tensor in like], dim)
        return [piece.reshape(t.shape) for piece, t in zip(pieces, like, strict=True)]

    def keep(
        self, store: MutableMapping[str, Tensors], names: Sequence[str], like: Sequence[Tensor]
    ) -> Tensors:
        """The joined tensors that `store` (part name -> tensors) has for the parts.

        Missing ones are zeros. Those in the store become views, and so change in place with them.

        Args:
            names: of the tensors.
            like: the parts' gradients.
        """
        for name in names:
            if name not in self.moments:
                own = [
                    store.get(part.name, {}).get(name, torch.zeros_like(gradient))
                    for part, gradient in zip(self.parts, like, strict=True)
                ]
                self.moments[name] = self.join(own)
                views = self.separate(self.moments[name], like)
                for part, view in zip(self.parts, views, strict=True):
                    store.setdefault(part.name, {})[name] = view
        return self.moments

    def singles(self, store: MutableMapping[str, Tensors]) -> Iterator[Batch]:
        """Each part as a batch of its own; `store` has the parts' tensors."""
        for part in self.parts:
            own = store.get(part.name, {})
            yield Batch((part,), None, {key: own[key] for key in self.tensors})


def make_batches(parts: Sequence[Part], store: MutableMapping[str, Tensors]) -> list[Batch]:
    """Joins parts of equal shape whose tensors have equal names, types and shapes.

    Args:
        store: part name -> tensors; those of joined parts are replaced by views.
    """
    found: dict[object, list[Part]] = {}
    for part in parts:
        found.setdefault(_key(part, store.get(part.name, {})), []).append(part)
    return [_joined(same, store) for same in found.values()]


def _layout(part: Part, own: Tensors) -> Layout:
    """Matrices join along their groups, units and entries of a diagonal in one long row."""
    if isinstance(part, KroneckerPart) and own:
        return Layout((part.kind.groups(part.module), *part.gradient_sides), 0)
    if isinstance(part, UnitwisePart) and own and part.has_bias:
        return Layout((2, -1), 1)
    return Layout((1, -1), 1)


def _key(part: Part, own: Tensors) -> object:
    """Parts with the same key are joined."""
    data = [piece.data for piece in part.slices]
    device = data[0].device
    limit = LARGEST_ENTRIES.get(device.type, LARGEST_ENTRIES_ELSEWHERE)
    by_row = isinstance(part, DiagonalPart) and part.by_row
    if by_row or sum(value.numel() for value in data) > limit:
        return part.name
    layout = _layout(part, own)
    tensors = tuple(
        (key, value.dtype, value.shape[: layout.dim], value.shape[layout.dim + 1 :])
        for key, value in sorted(own.items())
    )
    return layout, data[0].dtype, device, tensors


def _joined(parts: list[Part], store: MutableMapping[str, Tensors]) -> Batch:
    own = [store.get(part.name, {}) for part in parts]
    if len(parts) == 1:
        return Batch((parts[0],), None, dict(own[0]))
    layout = _layout(parts[0], own[0])
    batch = Batch(tuple(parts), layout, {})
    for key in own[0]:
        lengths = [tensors[key].shape[layout.dim] for tensors in own]
        batch.tensors[key] = torch.cat([tensors[key] for tensors in own], layout.dim)
        views = torch.split(batch.tensors[key], lengths, layout.dim)
        for tensors, view in zip(own, views, strict=True):
            tensors[key] = view
    return batch
