"""The inverses are made anew from the averages: all in one step, or a few in each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks.block import Block, Inverse, InverseSettings
from ..blocks.inversion import invert_all
from ..config import KFACConfig, is_due
from ..linalg import tree
from ..linalg.eigenbasis import Basis
from ..ranks import collectives
from ..ranks.placement import exchange_inverses
from ..seen_model import SeenModel
from ..state import BlockState, KFACState, Trouble
from ..tuning import INVERSION_PORTIONS, MANY_USES


def settings_of(state: KFACState, config: KFACConfig, uses: int) -> InverseSettings:
    """How curvature is inverted."""
    return InverseSettings(config.damping_kind, state.damping, config.relative_damping, uses)


def due_blocks(state: KFACState, seen: SeenModel, config: KFACConfig) -> list[Block]:
    """The blocks whose inverses this step renews by its number alone.

    With renewal "in_turns" all of them in the first interval's updates, where the averages change
    fast, and from then on each at its own step of an interval.
    """
    step, interval = state.step, config.inverse_update_steps
    if seen.turns is not None and step >= interval:
        return [b for b in seen.preconditioned if seen.turns[b.name] == step % interval]
    due = is_due(step, interval, early=config.early_updates)
    return seen.preconditioned if due else []


def refresh_inverses(
    state: KFACState, seen: SeenModel, config: KFACConfig, troubles: list[Trouble]
) -> bool:
    """Renews the inverses, or the damping in them, where that is due.

    On all ranks alike, whichever inverses a rank holds.

    Returns:
        Whether there are other inverses than before, in other memory.
    """
    known = any(block.curvature is not None for block in state.blocks.values())
    due = seen.preconditioned if state.inverses_stale else due_blocks(state, seen, config)
    has_moved = False
    if state.damping_changed and len(due) < len(seen.preconditioned):
        if config.damping_kind == "exact":
            renew_damping(state, seen.preconditioned, config)
            has_moved = True
        else:
            due = seen.preconditioned
    if not known or not due:
        return has_moved
    lost, moved = renew_inverses(state, due, seen, config)
    if lost:
        names = ", ".join(f"'{name}'" for name in lost)
        troubles.append(Trouble("inverse", f"the factors of {names} could not be inverted"))
    return moved or has_moved


def renew_inverses(
    state: KFACState, blocks: Sequence[Block], seen: SeenModel, config: KFACConfig
) -> tuple[list[str], bool]:
    """Makes the inverses of some blocks' averages, each on the rank that owns it.

    Returns:
        Names of the blocks whose average could not be inverted; their old inverse stays. And
        whether an inverse is in other memory than the one before it.
    """
    owners, rank = seen.owners, collectives.rank()
    exchanges = config.inverse_placement == "exchanged"
    present = [block for block in blocks if state.of(block).curvature is not None]
    uses = MANY_USES if owners and exchanges else config.inverse_update_steps
    settings = settings_of(state, config, uses)
    lost: list[str] = []
    moved = False
    largest = sum(block.cost() for block in seen.preconditioned) / INVERSION_PORTIONS
    for some in [present] if owners else _portions(present, largest):
        names = [block.name for block in some]
        mine = [name for name in names if owners.get(name, rank) == rank]
        curvatures = {name: state.blocks[name].curvature for name in mine}
        before = {name: state.blocks[name].inverse for name in mine if config.rule.follows_basis}
        made: dict[str, Inverse] = invert_all(curvatures, settings, before)  # type: ignore[arg-type]
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
                moved |= not _put(state.blocks[name], inverse)
    state.corrections = 0
    state.inverses_stale = state.damping_changed = False
    return lost, moved


def _portions(blocks: Sequence[Block], largest: float) -> list[list[Block]]:
    """Blocks whose inverses are made together: the old ones go before the next portion comes.

    Of about equal cost; every portion waits for the device once.
    """
    ordered = sorted(blocks, key=lambda block: block.cost())
    found: list[list[Block]] = [[]]
    cost = 0.0
    for block in ordered:
        if found[-1] and cost + block.cost() > largest:
            found.append([])
            cost = 0.0
        found[-1].append(block)
        cost += block.cost()
    return found


def _put(own: BlockState, inverse: Inverse) -> bool:
    """A new inverse in place of the old one; moments turn along with the basis.

    Returns:
        Whether it is in the memory of the old one, so that batches of inverses have it too. Not if
        it has another form, or shares its tensors with the average, as few rows do.
    """
    if own.moments is not None:
        old = Basis() if own.inverse is None else own.inverse.eigenbasis()
        tree.write(own.moments, own.moments.turned(old, inverse.eigenbasis()))
    if own.inverse is not None and own.curvature is not None:
        shares = tree.storages(inverse) & tree.storages(own.curvature)
        if not shares and tree.write(own.inverse, inverse):
            return True
    own.inverse = inverse
    return False


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
