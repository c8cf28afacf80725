"""The inverses are made anew from the averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..blocks.block import Block, Inverse, InverseSettings
from ..blocks.inversion import invert_all
from ..config import KFACConfig
from ..linalg.eigenbasis import Basis
from ..ranks import collectives
from ..ranks.placement import exchange_inverses
from ..seen_model import SeenModel
from ..state import BlockState, KFACState, Trouble
from ..tuning import INVERSION_PORTIONS, MANY_USES


def settings_of(state: KFACState, config: KFACConfig, uses: int) -> InverseSettings:
    """How curvature is inverted."""
    return InverseSettings(config.damping_kind, state.damping, config.relative_damping, uses)


def refresh_inverses(
    state: KFACState, seen: SeenModel, config: KFACConfig, due: bool, troubles: list[Trouble]
) -> bool:
    """Renews the inverses, or the damping in them, where that is due; whether it was.

    On all ranks alike, whichever inverses a rank holds.
    """
    known = any(block.curvature is not None for block in state.blocks.values())
    renew = due or state.inverses_stale
    if state.damping_changed and config.damping_kind == "exact" and not renew:
        renew_damping(state, seen.preconditioned, config)
        return True
    if not known or not (renew or state.damping_changed):
        return False
    lost = renew_inverses(state, seen.preconditioned, seen.owners, config)
    if lost:
        names = ", ".join(f"'{name}'" for name in lost)
        troubles.append(Trouble("inverse", f"the factors of {names} could not be inverted"))
    return True


def renew_inverses(
    state: KFACState, blocks: Sequence[Block], owners: Mapping[str, int], config: KFACConfig
) -> list[str]:
    """Makes the inverses of the blocks' averages.

    Args:
        owners: name -> the rank that computes its inverse; every rank makes those of others.

    Returns:
        Names of the blocks whose average could not be inverted; their old inverse stays.
    """
    rank, exchanges = collectives.rank(), config.inverse_placement == "exchanged"
    present = [block for block in blocks if state.of(block).curvature is not None]
    uses = MANY_USES if owners and exchanges else config.inverse_update_steps
    settings = settings_of(state, config, uses)
    lost: list[str] = []
    for some in [present] if owners else _portions(present):
        names = [block.name for block in some]
        mine = [name for name in names if owners.get(name, rank) == rank]
        curvatures = {name: state.blocks[name].curvature for name in mine}
        made: dict[str, Inverse] = invert_all(curvatures, settings)  # type: ignore[arg-type]
        failed = [float(name in mine and name not in made) for name in names]
        if owners and names:
            flags = torch.tensor(failed, device=_device(blocks, state))
            collectives.all_reduce_sums([flags])
            failed = flags.tolist()
        lost += [name for name, flag in zip(names, failed, strict=True) if flag]
        if owners and exchanges:
            shared = [name for name in names if name in owners and name not in lost]
            made.update(exchange_inverses(shared, owners, made, _device(blocks, state)))
        for name, inverse in made.items():
            if name not in lost:
                _put(state.blocks[name], inverse)
    state.corrections = 0
    state.inverses_stale = state.damping_changed = False
    return lost


def _portions(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks whose inverses are made together: the old ones go before the next portion comes.

    Of about equal cost; every portion waits for the device once.
    """
    ordered = sorted(blocks, key=lambda block: block.cost())
    found: list[list[Block]] = [[]]
    total, cost = sum(block.cost() for block in blocks), 0.0
    for block in ordered:
        if found[-1] and cost + block.cost() > total / INVERSION_PORTIONS:
            found.append([])
            cost = 0.0
        found[-1].append(block)
        cost += block.cost()
    return found


def _put(own: BlockState, inverse: Inverse) -> None:
    """A new inverse in place of the old one; moments turn along with the basis."""
    if own.moments is not None:
        old = Basis() if own.inverse is None else own.inverse.eigenbasis()
        own.moments = own.moments.turned(old, inverse.eigenbasis())
    own.inverse = inverse


def _device(blocks: Sequence[Block], state: KFACState) -> torch.device:
    for block in blocks:
        curvature = state.of(block).curvature
        if curvature is not None:
            return curvature.mean_eigenvalue().device
    return torch.device("cpu")


def renew_damping(state: KFACState, blocks: Sequence[Block], config: KFACConfig) -> None:
    """Takes a new damping into the inverses of kind "exact", whose eigenvalues stay."""
    settings = settings_of(state, config, 1)
    for block in blocks:
        own = state.of(block)
        if own.inverse is not None and own.curvature is not None:
            renewed = own.inverse.with_damping(own.curvature.strength(settings))
            own.inverse = renewed or own.curvature.inverse(settings, [])
    state.damping_changed = False
