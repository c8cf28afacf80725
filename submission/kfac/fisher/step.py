"""The statistics of a step: of its recorded passes, and their sum over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..blocks.block import Sums
from ..config import KFACConfig
from ..operations.record import Recording
from ..operations.sharing import SharingRule
from ..ranks.collectives import Reduction, rank
from .collect import Collection
from .loss_pass import LossPass, is_multiple, may_share
from .losses import LossTerms, parts_of, watch_weights
from .own_gradients import OwnGradients
from .passes import fisher_passes
from .sampling import sampling_seed

NOT_RECORDED = (
    "this step updates the factors, but its forward pass was not recorded: run it inside "
    "`with kfac.record():`"
)
STILL_OPEN = (
    "the step ends inside `with kfac.record():`: end that block after the loss; loss.backward() "
    "and the step come behind it"
)
NO_LOSS = (
    "this step updates the factors, but no loss is known: compute it by one of torch's functions "
    "(cross_entropy, binary_cross_entropy_with_logits, mse_loss, nll_loss) inside record(), or "
    "state it after record() by update(logits, likelihood); with fisher_type='empirical' CTC is "
    "seen too, and any loss can be stated by update(outputs, OwnGradients(), loss=loss)"
)
NOT_COME = (
    "the statistics of the recorded pass are to come from the backward pass of its loss, which has "
    "not come: call loss.backward() before this step ends, or leave `loss` out of update"
)
DROPPED = (
    "K-FAC: the statistics of a recorded pass are dropped: they were to come from the backward "
    "pass of its loss, which has not come (to its end) before the next record()"
)
ONE_LOSS = (
    "eigenvalue_correction takes one loss of a recorded pass: leave it out, or state one loss"
)
NO_GRAPH = "the logits have no graph: they are detached, or were computed under no_grad"


class RecordedPass:
    """A forward pass that was recorded, and the statistics that its losses give.

    Attributes:
        recording: what was seen.
        sharing: how rows share parameters, as it was given.
        losses: those whose statistics were taken.
        is_seen: whether these losses were seen, not stated.
    """

    def __init__(self, recording: Recording, sharing: SharingRule) -> None:
        self.recording, self.sharing = recording, sharing
        self.losses: list[LossTerms] = []
        self.is_seen = False
        self.terms: list[Tensor] = []
        self.weights: list[Tensor | None] = []
        self.loss_pass: LossPass | None = None
        self._collection: Collection | None = None
        self._generator_state: Tensor | None = None

    @property
    def waits_for_loss(self) -> bool:
        """Whether statistics are to come from a backward pass of the loss that has not ended."""
        return self.loss_pass is not None and not self.loss_pass.is_over

    @property
    def collection(self) -> Collection:
        """What is being collected."""
        assert self._collection is not None
        return self._collection

    def begin(self, collection: Collection, *, is_seen: bool, generator: torch.Generator) -> None:
        """Collects anew; what was collected before, of losses that were only seen, is dropped."""
        if self.loss_pass is not None:
            self.loss_pass.forget()
        self.loss_pass, self._collection = None, collection
        self.losses, self.terms, self.weights, self.is_seen = [], [], [], is_seen
        if self._generator_state is None:
            self._generator_state = generator.get_state()
        generator.set_state(self._generator_state)

    def add(
        self,
        loss: LossTerms,
        config: KFACConfig,
        generator: torch.Generator,
        *,
        may_wait: bool,
        looks: bool,
    ) -> bool:
        """Runs the Fisher passes of a loss, or waits for its own backward pass.

        Args:
            may_wait: whether the statistics may come from the loss's own pass.
            looks: whether it is looked at whether the loss is a multiple of the likelihood's, which
                waits for a device.

        Returns:
            Whether the loss is known to be such a multiple.
        """
        number, collection = len(self.losses), self.collection
        logits, likelihood = loss.logits, loss.likelihood
        terms = likelihood.terms(logits.detach(), loss.mask, loss.targets)
        if loss.divisor is not None:
            terms = torch.full_like(terms, loss.divisor)
        self.losses.append(loss)
        self.terms.append(terms)
        self.weights.append(None)
        is_known = not looks
        if collection.out_of_memory is not None:
            return is_known
        if isinstance(likelihood, OwnGradients):
            loss.targets = likelihood.gradient_of(loss.output, logits, terms)
        passes = partial(
            fisher_passes,
            likelihood,
            logits,
            mixes_examples=self.recording.mixes_examples,
            fisher_type=config.fisher_type,
            mc_samples=config.mc_samples,
            mask=loss.mask,
            targets=loss.targets,
            generator=generator,
            examples=collection.numbers_of_examples().values(),
        )
        if loss.output is not None and may_wait and may_share(collection, loss.output, logits):
            (at_labels,) = passes(signs=False)
            is_known = is_known or is_multiple(loss.output, logits, at_labels, terms)
            if is_known:
                self.loss_pass = LossPass(collection, logits, at_labels, terms)
                return True
        signs = True if collection.has_diagonals else None
        self.recording.is_collected = False
        for fisher_pass in passes(signs=signs):
            collection.fisher_pass(logits, fisher_pass, number)
        self.recording.is_collected = True
        return is_known

    def weigh(self) -> None:
        """Measures what the loss that is trained on multiplies each of several seen losses by."""
        for number, loss in enumerate(self.losses if len(self.losses) > 1 else ()):
            assert loss.output is not None
            loss.output.register_hook(partial(self._hear_weight, number))  # type: ignore[no-untyped-call]

    def _hear_weight(self, number: int, gradient: Tensor) -> None:
        self.weights[number] = gradient.detach().sum()

    def relative_weights(self) -> list[Tensor | None]:
        """Of the mean of each loss, None for 1; whatever the loss that is trained on is scaled by.

        Losses beside each other have their ratios to the largest. Parts of one mean (they have
        layers in common, but no call of one, or are of other rows of the same outputs) have their
        shares of it.
        """
        if len(self.losses) < 2 or not self.is_seen or all(w is None for w in self.weights):
            return [None] * len(self.losses)
        found = []
        for loss, terms, weight in zip(self.losses, self.terms, self.weights, strict=True):
            if weight is None:  # seen, but not trained on
                found.append(torch.zeros_like(terms))
            else:
                found.append(weight.abs().to(terms.dtype) * (terms if loss.is_sum else 1))
        means = parts_of(self.losses, self.collection.reached)
        units = [_largest_of([found[n] for n in part]) for mean in means for part in mean]
        sizes = [len(mean) for mean in means]
        unit = torch.stack([m.sum() for m in torch.split(torch.stack(units), sizes)]).amax()
        return [weight / unit for weight in found]

    def finish(self) -> dict[str, Sums]:
        """The sums; lets go of the graph."""
        if self.loss_pass is not None:
            self.loss_pass.collect()
        return self.collection.finish()

    def drop(self) -> None:
        """Lets go of everything."""
        if self.loss_pass is not None:
            self.loss_pass.forget()
        self.recording.release()


def _largest_of(weights: list[Tensor]) -> Tensor:
    largest: Tensor = torch.stack(weights).amax()  # an index by a list would wait for a GPU
    return largest


@dataclass
class Accumulated:
    """Sums over the micro-batches of a step, and over ranks once they were added up.

    Attributes:
        sums: name of a block -> sums.
        terms: number of terms of each loss.
        weighted: the same, each with the weight of its loss; empty for one loss.
        out_of_memory: what was being done when memory ran out, or None.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    terms: list[Tensor] = field(default_factory=list)
    weighted: list[Tensor] = field(default_factory=list)
    out_of_memory: str | None = None

    def add(self, recorded: RecordedPass) -> None:
        """Adds what one recorded pass has collected."""
        weighted = [
            terms if weight is None else terms * weight
            for terms, weight in zip(recorded.terms, recorded.relative_weights(), strict=True)
        ]
        if not self.terms:
            self.terms, self.weighted = list(recorded.terms), weighted
        elif len(self.terms) == len(recorded.terms):
            self.terms = [a + b for a, b in zip(self.terms, recorded.terms, strict=True)]
            self.weighted = [a + b for a, b in zip(self.weighted, weighted, strict=True)]
        else:
            raise RuntimeError(
                f"the recorded passes of one step have {len(self.terms)} and "
                f"{len(recorded.terms)} losses: their curvatures cannot be added up"
            )
        for name, sums in recorded.finish().items():
            if name in self.sums:
                self.sums[name].merge(sums)
            else:
                self.sums[name] = sums
        self.out_of_memory = self.out_of_memory or recorded.collection.out_of_memory

    def divisors(self) -> list[Tensor | None]:
        """What squares of would-be gradients of each loss are divided by."""
        if len(self.terms) < 2:
            return list(self.terms)
        return [
            terms.clamp(min=1).square() / weighted.clamp(min=1e-30)
            for terms, weighted in zip(self.terms, self.weighted, strict=True)
        ]

    def is_out_of_memory_on_a_rank(self) -> bool:
        """Whether memory ran out on any rank, once the sums have been added up over them."""
        return bool(self.terms) and bool(self.terms[0] == -torch.inf)


class StepStatistics:
    """Collects over the recorded passes of a step; `finish` ends the step.

    Args:
        config: which Fisher.
        device: of the parameters.
    """

    def __init__(self, config: KFACConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._generator: torch.Generator | None = None  # of this step, see `sampling_seed`
        self._is_multiple = False  # the last loss that was looked at, of the likelihood's
        self._watched_weights = False  # of an unreduced loss's terms
        self._loss_given = False  # in this step: statistics come late, on one rank or all
        self._accumulated: Accumulated | None = None
        self._reduction: Reduction | None = None
        self._discoveries: Tensor | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there are statistics of this step yet."""
        return self._accumulated is not None

    @property
    def comes_with_loss(self) -> bool:
        """Whether the statistics of the last pass came with the loss's own backward pass."""
        return self._is_multiple

    def begin(self, recorded: RecordedPass, collection: Collection, step: int, seen: bool) -> None:
        """Begins with the statistics of a recorded pass."""
        if self._generator is None:
            seed = sampling_seed(self.config.seed, step, rank())
            self._generator = torch.Generator(self._device).manual_seed(seed)
        recorded.begin(collection, is_seen=seen, generator=self._generator)

    def collect(self, recorded: RecordedPass, loss: LossTerms, *, alone: bool) -> None:
        """Takes the statistics of a loss of a recorded pass.

        Args:
            alone: whether it is the only loss of the pass.
        """
        assert self._generator is not None
        if self.config.eigenvalue_correction and not alone:
            raise RuntimeError(ONE_LOSS)
        if loss.output is not None and loss.output.numel() > 1 and not self._watched_weights:
            self._watched_weights = True
            watch_weights(loss)
        # On all ranks alike, also on one that ran out of memory: else collectives change places.
        late = loss.output is not None and self.config.fisher_type == "empirical" and alone
        self._loss_given |= late
        # Looking waits for a GPU: once is enough. A later loss that is another multiple in each of
        # its terms makes the sums NaN, the update is dropped, and the next one looks again.
        is_multiple = recorded.add(
            loss, self.config, self._generator, may_wait=late, looks=not self._is_multiple
        )
        if late:
            self._is_multiple = is_multiple

    def end_pass(self, recorded: RecordedPass) -> None:
        """Takes over what a recorded pass has collected."""
        self._accumulated = self._accumulated or Accumulated()
        self._accumulated.add(recorded)

    def reduce_early(self, empty: Mapping[str, Any], discoveries: int) -> None:
        """Starts the sum over the ranks, unless on some rank statistics may still have to come."""
        if not self._loss_given:
            self._start_reduction(empty, discoveries)

    def _start_reduction(self, empty: Mapping[str, Any], discoveries: int) -> None:
        """Gives every block its sums, so that all ranks have the same, and adds them up.

        After memory ran out the number of terms is minus infinity: no rank will use the sum over
        ranks, and all know.

        Args:
            empty: name of a block -> what makes its empty sums from the number of losses.
            discoveries: number of uses of parameters that only this rank knows of.
        """
        total = self._accumulated
        if total is None or self._reduction is not None:
            return
        if total.out_of_memory is not None:
            total.sums.clear()
            total.terms = [torch.full_like(terms, -torch.inf) for terms in total.terms]
        losses = len(total.terms)
        tensors: list[tuple[Tensor, bool]] = []
        known = {}
        for name, make in empty.items():
            zeros = make(losses)
            sums = known[name] = total.sums.get(name, zeros)
            sums.pad(zeros)
            tensors += sums.tensors()
        total.sums = known
        self._discoveries = total.terms[0].new_full((), float(discoveries))
        weighted = total.weighted if losses > 1 else []
        tensors += [(terms, False) for terms in (*total.terms, *weighted, self._discoveries)]
        self._reduction = Reduction([t for t, _ in tensors], [mark for _, mark in tensors])

    def finish(
        self, empty: Mapping[str, Any], discoveries: int, *, alone: bool
    ) -> tuple[Accumulated | None, bool]:
        """The sums over micro-batches and ranks, if there are any; begins a new step.

        Args:
            empty, discoveries: as in `_start_reduction`.
            alone: whether there is one rank: then blocks that were not reached have no sums.

        Returns:
            (sums, whether any rank has made discoveries).
        """
        if alone:
            total = self._accumulated
            self.forget()
            if total is not None and total.out_of_memory is not None:
                total.sums.clear()
                total.terms = [torch.full_like(terms, -torch.inf) for terms in total.terms]
            if total is not None:
                _pad(total, empty)
            return total, discoveries > 0
        self._start_reduction(empty, discoveries)
        accumulated, reduction, found = self._accumulated, self._reduction, self._discoveries
        self.forget()
        if accumulated is None or reduction is None or found is None:
            return None, False
        reduction.wait()
        return accumulated, bool(found > 0)

    def forget(self) -> None:
        """Begins a new step, without the statistics of this one."""
        self._loss_given, self._generator = False, None
        self._accumulated = self._reduction = self._discoveries = None

    def look_at_loss_again(self) -> bool:
        """The sums were of no use: was it taken for granted that the loss is a multiple?"""
        was, self._is_multiple = self._is_multiple, False
        return was


def _pad(total: Accumulated, empty: Mapping[str, Any]) -> None:
    """Gives the sums of blocks that only some losses reach zeros for the others."""
    total.sums = {name: sums for name, sums in total.sums.items() if name in empty}
    if len(total.terms) > 1:
        for name, sums in total.sums.items():
            sums.pad(empty[name](len(total.terms)))
