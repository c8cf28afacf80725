"""A step's statistics go into the averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.block import Block
from ..blocks.factors import EigenInverse
from ..blocks.kronecker import KroneckerBlock
from ..blocks.kronecker_sums import KroneckerSums
from ..fisher.step import Accumulated, StepStatistics
from ..ranks import collectives
from ..seen_model import SeenModel
from ..state import KFACState, Trouble


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


def take_in(
    state: KFACState,
    seen: SeenModel,
    statistics: StepStatistics,
    decay: float,
    troubles: list[Trouble],
) -> Accumulated | None:
    """Takes the step's statistics, summed over ranks, into the averages.

    Returns:
        The sums if they were good; otherwise None, and there is one more trouble.
    """
    alone = collectives.world_size() == 1
    total, discovered = statistics.finish(seen.empty_sums(), seen.discoveries, alone=alone)
    if total is None:
        return None
    good = average_in(state, total, seen.observed_blocks, decay)
    if discovered:
        seen.share_discoveries()
    if good:
        return total
    if total.is_out_of_memory_on_a_rank():
        state.examples_share /= 2
        where = total.out_of_memory or "the factors of another rank"
        share = f"{100 * state.examples_share:g} %"
        message = f"memory ran out in {where}; from now on {share} of the examples are used"
        troubles.append(Trouble("memory", message))
        return None
    message = (
        "the batch gave non-finite statistics (with a loss that grows: lower the learning rate, or "
        "raise the damping) or had no valid label"
    )
    if statistics.look_at_loss_again():
        message += ", or its loss was not a multiple of the likelihood's"
    troubles.append(Trouble("statistics", message))
    return None


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
