"""What `KFAC.precondition` writes into the gradients of all parts.

Functions on `KFACState`; `KFAC` owns the state.
"""

from __future__ import annotations

from torch import Tensor

from . import inverses
from .config import KFACConfig
from .eigenbasis_adam import count_step, direction
from .gradients import read_gradient, write_gradient
from .model_parts import ModelParts
from .placements import exchange_gradients
from .state import KFACState
from .statistics import statistics_dtype


def write_preconditioned(state: KFACState, parts: ModelParts, config: KFACConfig) -> None:
    """Replaces gradients by (curvature + damping)⁻¹ times them, for parts that have an inverse."""
    kept_on_one_rank = parts.owners if config.inverse_placement == "one_rank" else {}
    exchanged: dict[str, Tensor] = {}
    for part in parts.partition.parts:
        inverse = state.inverses.get(part.name)
        gradient = None
        if inverse is not None or part.name in kept_on_one_rank:
            gradient = read_gradient(part)
        if gradient is None:
            continue
        if inverse is not None:
            dtype = next(iter(inverse.values())).dtype
            gradient = inverses.precondition(part, inverse, gradient.to(dtype))
        if part.name in kept_on_one_rank:
            exchanged[part.name] = gradient.to(statistics_dtype(gradient)).contiguous()
        else:
            write_gradient(part, gradient)
    exchange_gradients(exchanged, parts.owners)
    for part in parts.partition.parts:
        if part.name in exchanged:
            write_gradient(part, exchanged[part.name])


def write_eigenbasis_steps(state: KFACState, parts: ModelParts, config: KFACConfig) -> None:
    """Replaces gradients by Adam's updates in the eigenbasis of the factors."""
    gradients: dict[str, Tensor] = {}
    for part in parts.partition.parts:
        gradient = read_gradient(part)
        if gradient is not None:
            gradients[part.name] = gradient.to(statistics_dtype(gradient))
    if not gradients:
        return
    state.count, finite = count_step(state.count, list(gradients.values()))
    for part in parts.partition.parts:
        if part.name in gradients:
            update = direction(
                state.inverses.get(part.name, {}),
                state.moments.setdefault(part.name, {}),
                gradients[part.name],
                betas=config.betas,
                epsilon=config.epsilon,
                count=state.count,
                finite=finite,
            )
            write_gradient(part, update)
