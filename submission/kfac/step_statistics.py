"""The statistics of one step: from Fisher passes, or the loss's own, to their sum over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from . import distributed
from .accumulation import Accumulated
from .capture import Recording
from .config import KFACConfig
from .distributed import Reduction
from .likelihoods import Likelihood
from .loss_pass import LossPass, is_multiple, may_share
from .passes import FisherPass, fisher_passes
from .sampling import sampling_seed
from .statistics import Part


class StepStatistics:
    """Collects over the micro-batches of a step; `finish` ends the step.

    Args:
        model: unwrapped.
        config: which Fisher, and how it is sampled.
        device: of the parameters.
    """

    def __init__(self, model: nn.Module, config: KFACConfig, device: torch.device) -> None:
        self._model, self.config = model, config
        self._generator = torch.Generator(device)  # seeded in every step, see `sampling_seed`
        self._loss_pass: LossPass | None = None  # whose backward pass is to come
        self._is_multiple = False  # the last loss that was looked at, of the likelihood's
        self._loss_given = False  # in this step: statistics come late, on one rank or all
        self._accumulated: Accumulated | None = None
        self._reduction: Reduction | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there are statistics of this step yet."""
        return self._accumulated is not None

    @property
    def waits_for_loss(self) -> bool:
        """Whether statistics are to come from a backward pass of the loss that has not come."""
        return self._loss_pass is not None

    def collect(
        self,
        recording: Recording,
        logits: Tensor,
        likelihood: Likelihood,
        *,
        step: int,
        mask: Tensor | None,
        targets: Tensor | None,
        loss: Tensor | None,
    ) -> None:
        """Runs the Fisher passes of a recording, or has it listen to the loss's backward pass.

        Args as those of `KFAC.update`; `step` is for the labels that are sampled.
        """
        if not self.is_begun:
            seed = sampling_seed(self.config.seed, step, distributed.rank())
            self._generator.manual_seed(seed)
        terms = likelihood.terms(logits.detach(), mask, targets)
        # On all ranks alike, also on one that ran out of memory: else collectives change places.
        from_loss = loss is not None and self.config.fisher_type == "empirical"
        self._loss_given |= from_loss
        if recording.out_of_memory is None:
            passes = partial(
                fisher_passes,
                likelihood,
                logits,
                self._model,
                fisher_type=self.config.fisher_type,
                mc_samples=self.config.mc_samples,
                mask=mask,
                targets=targets,
                generator=self._generator,
                examples=recording.examples.values(),
            )
            if loss is not None and from_loss:
                (at_labels,) = passes(signs=False)
                if self._is_shareable(recording, loss, logits, at_labels, terms):
                    self._loss_pass = LossPass(recording, logits, at_labels, terms)
            if self._loss_pass is None:
                signs = True if recording.has_bare_parameters else None
                for fisher_pass in passes(signs=signs):
                    recording.fisher_pass(logits, fisher_pass)
                recording.end_passes()
        if self._loss_pass is None:
            self._add(recording, terms)

    def _is_shareable(
        self,
        recording: Recording,
        loss: Tensor,
        logits: Tensor,
        at_labels: FisherPass,
        terms: Tensor,
    ) -> bool:
        if not may_share(recording, loss, logits):
            return False
        # Looking waits for a GPU: once is enough. A later loss that is another multiple in each of
        # its terms makes the sums NaN, the update is dropped, and the next one looks again.
        if not self._is_multiple:
            self._is_multiple = is_multiple(loss, logits, at_labels, terms)
        return self._is_multiple

    def _add(self, recording: Recording, terms: Tensor) -> None:
        """Takes over what a recording has, whose passes are done."""
        self._accumulated = self._accumulated or Accumulated()
        self._accumulated.add(recording, terms)
        recording.release()

    def end_loss_pass(self) -> None:
        """Collects from the backward pass of the loss, if it was waited for and has come."""
        loss_pass = self._loss_pass
        if loss_pass is None or not loss_pass.is_over:
            return
        self._loss_pass = None
        loss_pass.collect()
        self._add(loss_pass.recording, loss_pass.terms)

    def drop_loss_pass(self) -> None:
        """Waits no longer, and lets go of the recording."""
        if self._loss_pass is not None:
            self._loss_pass.drop()
            self._loss_pass = None

    def reduce_early(self, observed: Sequence[Part], uncalled: Sequence[Part]) -> None:
        """Starts the sum over the ranks, unless on some rank statistics may still have to come."""
        if not self._loss_given:
            self._start_reduction(observed, uncalled)

    def _start_reduction(self, observed: Sequence[Part], uncalled: Sequence[Part]) -> None:
        accumulated = self._accumulated
        if accumulated is None or self._reduction is not None:
            return
        accumulated.complete(observed, uncalled)
        tensors, symmetric = accumulated.tensors()
        self._reduction = Reduction(tensors, symmetric)

    def finish(self, observed: Sequence[Part], uncalled: Sequence[Part]) -> Accumulated | None:
        """The sums over micro-batches and ranks, if there are any; begins a new step.

        Args:
            observed: parts that all ranks have sums of.
            uncalled: layers whose calls are counted over the ranks.
        """
        self._start_reduction(observed, uncalled)
        accumulated, reduction = self._accumulated, self._reduction
        self.forget()
        if accumulated is None or reduction is None:
            return None
        reduction.wait()
        return accumulated

    def forget(self) -> None:
        """Begins a new step, without the statistics of this one."""
        self._loss_given, self._accumulated, self._reduction = False, None, None

    def look_at_loss_again(self) -> bool:
        """The sums were of no use: was it taken for granted that the loss is a multiple?"""
        was, self._is_multiple = self._is_multiple, False
        return was
