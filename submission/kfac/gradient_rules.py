"""What `KFAC.precondition` writes into the gradients of all parts.

Functions on `KFACState`; `KFAC` owns the state, and the batches that its tensors are joined in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from . import inverses
from .batches import Batch, Tensors, make_batches
from .config import KFACConfig
from .eigenbasis_adam import AdamStep, directions
from .gradients import read_gradient, write_gradients
from .model_parts import ModelParts
from .placements import exchange_gradients
from .state import KFACState
from .statistics import KroneckerPart, Part, statistics_dtype


def make_state_batches(state: KFACState, parts: ModelParts, config: KFACConfig) -> list[Batch]:
    """Batches of the parts with an inverse; of all parts, by their bases, for the eigenbasis."""
    if config.direction != "eigenbasis_adam":
        present = [part for part in parts.partition.parts if part.name in state.inverses]
        return make_batches(present, state.inverses)
    bases: dict[str, Tensors] = {}
    for part in parts.partition.parts:
        if isinstance(part, KroneckerPart):
            own = state.inverses.get(part.name, {})
            bases[part.name] = {k: v for k, v in own.items() if k.endswith("eigenvectors")}
    found = make_batches(parts.partition.parts, bases)
    for name, basis in bases.items():
        state.inverses.get(name, {}).update(basis)
    return found


def write_preconditioned(
    state: KFACState, batches: Sequence[Batch], parts: ModelParts, config: KFACConfig
) -> None:
    """Replaces gradients by (curvature + damping)⁻¹ times them, for parts that have an inverse."""
    kept_on_one_rank = parts.owners if config.inverse_placement == "one_rank" else {}
    done: list[tuple[Part, Tensor]] = []
    for batch, gradients in _with_gradients(batches, state.inverses):
        joined = batch.join(gradients)
        if batch.tensors:
            joined = joined.to(next(iter(batch.tensors.values())).dtype)
        result = inverses.precondition(batch.parts[0], batch.tensors, joined)
        done += zip(batch.parts, batch.separate(result, gradients), strict=True)
    if kept_on_one_rank:
        done = _exchanged(done, parts, kept_on_one_rank)
    write_gradients([part for part, _ in done], [value for _, value in done])


def _exchanged(
    done: list[tuple[Part, Tensor]], parts: ModelParts, owners: dict[str, int]
) -> list[tuple[Part, Tensor]]:
    """With the results of the layers that other ranks have the inverses of."""
    results = {part.name: value for part, value in done}
    exchanged: dict[str, Tensor] = {}
    for part in parts.partition.parts:
        gradient = results.get(part.name)
        if gradient is None and part.name in owners:
            gradient = read_gradient(part)
        if gradient is not None and part.name in owners:
            exchanged[part.name] = gradient.to(statistics_dtype(gradient)).contiguous()
    exchange_gradients(exchanged, owners)
    results.update(exchanged)
    return [(part, results[part.name]) for part in parts.partition.parts if part.name in results]


def write_eigenbasis_steps(state: KFACState, batches: Sequence[Batch], config: KFACConfig) -> None:
    """Replaces gradients by Adam's updates in the eigenbasis of the factors."""
    ready = list(_with_gradients(batches, state.inverses))
    if not ready:
        return
    joined = [batch.join([g.to(statistics_dtype(g)) for g in own]) for batch, own in ready]
    step = AdamStep.of(state.count, joined, betas=config.betas, epsilon=config.epsilon)
    state.count = step.count
    moments = [
        batch.keep(state.moments, ("first", "second"), batch.separate(gradient, own))
        for (batch, own), gradient in zip(ready, joined, strict=True)
    ]
    updates = directions([batch.tensors for batch, _ in ready], moments, joined, step)
    done: list[tuple[Part, Tensor]] = []
    for (batch, own), update in zip(ready, updates, strict=True):
        done += zip(batch.parts, batch.separate(update, own), strict=True)
    write_gradients([part for part, _ in done], [value for _, value in done])


def _with_gradients(
    batches: Sequence[Batch], store: dict[str, Tensors]
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """The batches with the gradients of their parts; parts without a gradient are left out."""
    for batch in batches:
        gradients = [read_gradient(part) for part in batch.parts]
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) == len(gradients):
            yield batch, present
        elif present:
            for single, gradient in zip(batch.singles(store), gradients, strict=True):
                if gradient is not None:
                    yield single, [gradient]
