"""One step's changes of the state: averages, inverses, and what is written into gradients.

Functions on `KFACState`; `Preconditioner` decides when they are called, and owns the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks.batches import Batch, make_batches
from .blocks.block import Block, Inverse, InverseSettings, statistics_dtype, write
from .blocks.inversion import invert_all
from .blocks.kronecker import EigenInverse, KroneckerBlock, KroneckerSums
from .config import KFACConfig
from .fisher.step import Accumulated
from .linalg.eigenbasis import AdamStep, Basis, Moments, directions
from .ranks import collectives
from .ranks.placement import exchange_gradients, exchange_inverses
from .state import KFACState
from .tuning import MANY_USES

Gradients = Mapping[str, Tensor | None]


# ---- averages --------------------------------------------------------------------------------


def average_in(state: KFACState, total: Accumulated, blocks: Sequence[Block], decay: float) -> bool:
    """Moves the averages towards new sums, if these are finite and there are terms.

    A block that was not reached keeps its average: zeros would not be its curvature. Averages are
    bias-corrected: the t-th update of a block has the weight (1 - decay) / (1 - decay^t).

    Returns:
        Whether the sums were good.
    """
    present = [block for block in blocks if block.name in total.sums]
    faults = [f for b in present for f in total.sums[b.name].where_faults_show()]
    counts = [total.sums[block.name].count for block in present]
    checked = [*total.terms, *(fault.sum() for fault in faults)]
    good = torch.stack([tensor.double() for tensor in checked]).isfinite().all()
    good &= total.terms[0] > 0
    usable, *reached = torch.stack([good.double(), *[c.double() for c in counts]]).tolist()
    if not usable:
        return False
    divisors = total.divisors()
    for block, count in zip(present, reached, strict=True):
        if not count:
            continue
        new = total.sums[block.name].curvature(divisors, 1.0)
        own = state.of(block)
        own.updates += 1
        weight = (1 - decay) / (1 - decay**own.updates)
        if own.curvature is None or weight == 1:
            own.curvature = new
        else:
            own.curvature = own.curvature.moved_towards(new, weight)
    return True


# ---- inverses --------------------------------------------------------------------------------


def settings_of(state: KFACState, config: KFACConfig, uses: int) -> InverseSettings:
    """How curvature is inverted."""
    return InverseSettings(config.damping_kind, state.damping, config.relative_damping, uses)


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
    present = [block.name for block in blocks if state.of(block).curvature is not None]
    mine = [name for name in present if owners.get(name, rank) == rank]
    uses = MANY_USES if owners and exchanges else config.inverse_update_steps
    curvatures = {name: state.blocks[name].curvature for name in mine}
    made: dict[str, Inverse] = invert_all(curvatures, settings_of(state, config, uses))  # type: ignore[arg-type]
    failed = [float(name in mine and name not in made) for name in present]
    if owners and present:
        flags = torch.tensor(failed, device=_device(blocks, state))
        collectives.all_reduce_sums([flags])
        failed = flags.tolist()
    lost = [name for name, flag in zip(present, failed, strict=True) if flag]
    if owners and exchanges:
        shared = [name for name in present if name in owners and name not in lost]
        device = _device(blocks, state)
        made.update(exchange_inverses(shared, owners, made, device))
    for name, inverse in made.items():
        if name not in lost:
            own = state.blocks[name]
            if own.moments is not None:
                old = Basis() if own.inverse is None else own.inverse.eigenbasis()
                own.moments = own.moments.turned(old, inverse.eigenbasis())
            own.inverse = inverse
    state.corrections = 0
    state.inverses_stale = state.damping_changed = False
    return lost


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


def correct_eigenvalues(
    state: KFACState, blocks: Sequence[Block], total: Accumulated, decay: float
) -> None:
    """Moves the corrected eigenvalues (EKFAC) towards the second moments in the present basis."""
    layers: list[tuple[EigenInverse, list[tuple[Tensor, Tensor]]]] = []
    for block in blocks:
        inverse = state.of(block).inverse
        if not isinstance(block, KroneckerBlock) or not isinstance(inverse, EigenInverse):
            continue
        if block.is_correctable:
            sums = total.sums.get(block.name)
            layers.append((inverse, sums.rows if isinstance(sums, KroneckerSums) else []))
    if not layers:
        return
    terms = total.terms[0]
    moments = [inverse.second_moments(rows) for inverse, rows in layers]
    reached = torch.tensor([float(bool(rows)) for _, rows in layers], device=terms.device)
    collectives.all_reduce_sums([*moments, reached])
    state.corrections += 1
    weight = (1 - decay) / (1 - decay**state.corrections)
    for (inverse, _), moment, count in zip(layers, moments, reached.tolist(), strict=True):
        if count:
            average = moment / terms.to(moment.dtype)
            old = inverse.corrected
            inverse.corrected = average if old is None else old.lerp_(average, weight)


# ---- gradients -------------------------------------------------------------------------------


@dataclass(eq=False)
class Work:
    """Blocks in batches, for one direction; made anew when inverses are."""

    blocks: Sequence[Block]
    batches: list[Batch]
    moments: list[Moments | None]


def make_work(
    state: KFACState, blocks: Sequence[Block], parameters: Mapping[str, Tensor], adam: bool
) -> Work:
    """Batches of the blocks with an inverse; of all blocks, by their bases, for the eigenbasis."""

    def like(block: Block) -> Tensor:
        return parameters[block.pieces[0].parameter]

    if not adam:
        inverses = {b.name: state.of(b).inverse for b in blocks}

        def put(name: str, inverse: Inverse) -> None:
            state.blocks[name].inverse = inverse

        present = [block for block in blocks if inverses[block.name] is not None]
        return Work(blocks, make_batches(present, inverses, put, like), [])
    bases: dict[str, Basis | None] = {}
    for block in blocks:
        inverse = state.of(block).inverse
        basis = None if inverse is None else inverse.eigenbasis()
        bases[block.name] = None if basis is None or basis.is_trivial else basis

    def put_basis(name: str, basis: Basis) -> None:
        inverse = state.blocks[name].inverse
        assert isinstance(inverse, EigenInverse)
        inverse.basis = basis

    batches = make_batches(blocks, bases, put_basis, like)
    return Work(blocks, batches, [None] * len(batches))


def preconditioned(
    state: KFACState,
    work: Work,
    blocks: Sequence[Block],
    owners: Mapping[str, int],
    gradients: Gradients,
) -> list[tuple[Block, Tensor]]:
    """(curvature + damping)⁻¹ times the gradients, of blocks that have an inverse.

    Args:
        owners: of inverses that are kept on one rank alone.
    """
    done: list[tuple[Block, Tensor]] = []
    for batch in work.batches:
        for part, own in _with_gradients(batch, state, gradients):
            joined = part.join([g.to(statistics_dtype(g)) for g in own])
            result = part.object.apply(joined)
            done += zip(part.blocks, part.separate(result, own), strict=True)
    if not owners:
        return done
    results = {block.name: value for block, value in done}
    exchanged: dict[str, Tensor] = {}
    for block in blocks:
        if block.name in owners:
            gradient = results.get(block.name)
            gradient = block.read(gradients) if gradient is None else gradient
            if gradient is not None:
                exchanged[block.name] = gradient.to(statistics_dtype(gradient)).contiguous()
    exchange_gradients(exchanged, owners)
    results.update(exchanged)
    return [(block, results[block.name]) for block in blocks if block.name in results]


def eigenbasis_steps(
    state: KFACState, work: Work, gradients: Gradients, config: KFACConfig
) -> list[tuple[Block, Tensor]]:
    """Adam's updates in the eigenbasis of the factors."""
    ready: list[tuple[Batch, list[Tensor], Moments]] = []
    for number, batch in enumerate(work.batches):
        own = [block.read(gradients) for block in batch.blocks]
        if all(g is not None for g in own):
            present = [g.to(statistics_dtype(g)) for g in own if g is not None]
            moments = work.moments[number]
            if moments is None:
                moments = work.moments[number] = _joined_moments(state, batch, present)
            ready.append((batch, present, moments))
            continue
        work.moments[number] = None
        for block, gradient in zip(batch.blocks, own, strict=True):
            if gradient is not None:
                gradient = gradient.to(statistics_dtype(gradient))
                inverse = state.of(block).inverse
                basis = None if inverse is None else inverse.eigenbasis()
                single = Batch((block,), None, basis)
                ready.append((single, [gradient], _joined_moments(state, single, [gradient])))
    if not ready:
        return []
    joined = [batch.join(own) for batch, own, _ in ready]
    step = AdamStep.of(state.count, joined, betas=config.betas, epsilon=config.epsilon)
    state.count = step.count
    bases = [batch.object or Basis() for batch, _, _ in ready]
    updates = directions(bases, [moments for _, _, moments in ready], joined, step)
    done: list[tuple[Block, Tensor]] = []
    for (batch, like, _), update in zip(ready, updates, strict=True):
        done += zip(batch.blocks, batch.separate(update, like), strict=True)
    return done


def _joined_moments(state: KFACState, batch: Batch, like: Sequence[Tensor]) -> Moments:
    """The moments of a batch; those that the state keeps become views, and change with them."""
    own = []
    for block, gradient in zip(batch.blocks, like, strict=True):
        kept = state.of(block).moments
        own.append(Moments.zeros_like(gradient) if kept is None else kept)
    first, second = batch.join([m.first for m in own]), batch.join([m.second for m in own])
    views = zip(batch.separate(first, like), batch.separate(second, like), strict=True)
    for block, (one, two) in zip(batch.blocks, views, strict=True):
        state.of(block).moments = Moments(one, two)
    return Moments(first, second)


def _with_gradients(
    batch: Batch, state: KFACState, gradients: Gradients
) -> list[tuple[Batch, list[Tensor]]]:
    """A batch with its gradients, or its blocks one by one where some have none."""
    own = [block.read(gradients) for block in batch.blocks]
    present = [g for g in own if g is not None]
    if len(present) == len(own):
        return [(batch, present)]
    return [
        (Batch((block,), None, state.of(block).inverse), [gradient])
        for block, gradient in zip(batch.blocks, own, strict=True)
        if gradient is not None
    ]


def write_done(done: Sequence[tuple[Block, Tensor]], tensors: Mapping[str, Tensor | None]) -> None:
    """Writes results into the parameters' tensors."""
    write([block for block, _ in done], [value for _, value in done], tensors)
