"""Preconditioner: when things happen in a step of K-FAC, and who owns the state.

    with kfac.record():                              # sees operations, on steps that need factors
        loss = F.cross_entropy(model(x), y)          # the loss inside: its likelihood is seen
    loss.backward()                                  # the ordinary gradient of the mean loss
    kfac.precondition()                              # p.grad <- (curvature + damping)^-1 p.grad
    optimizer.step()

A loss that is not one of torch's, or is computed outside, is stated by `kfac.update(logits,
likelihood)` between record() and the backward pass. With gradient accumulation, recording and
backward pass are repeated before one `precondition`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks.block import Block, write
from .blocks.public import Curvature
from .blocks.structure import Structure
from .config import KFACConfig, as_config, check_damping, is_due
from .fisher import step as of_step
from .fisher.likelihoods import Likelihood, as_likelihood
from .fisher.losses import LossTerms, check_class_dim, check_statement, usable
from .fisher.step import RecordedPass, StepStatistics
from .linalg.precision import own_products
from .operations.record import Recording
from .operations.sharing import SharingRule, check_names
from .ranks import collectives
from .ranks.sharded import take_parts, whole_gradients
from .report import ReportRow, format_report, report_rows
from .seen_model import SeenModel
from .state import KFACState, Trouble, account, timed
from .updates.averages import correct_eigenvalues, take_in
from .updates.directions import Rule
from .updates.inverses import refresh_inverses

logger = logging.getLogger(__name__)


class Preconditioner:
    """Kronecker-factored preconditioner of a model's gradients.

    With another `direction` than "preconditioned" it writes a finished update in its place.

    Args:
        model: any module; wrappers of DDP and torch.compile are looked through.
        config: see `KFACConfig`.

    Attributes:
        config: the settings; `damping` may change during training, see the property.
    """

    def __init__(self, model: nn.Module, config: KFACConfig | None = None) -> None:
        self.config = as_config(config)
        approx = self.config.kfac_approx
        self._state = KFACState(self.config.damping, None if approx == "auto" else approx)
        self._seen = SeenModel(model, self.config, self._state)
        self._device = next(iter(self.parameters.values())).device
        self._statistics = StepStatistics(self.config, self._device)
        self._pass: RecordedPass | None = None  # the last recorded one, until it is taken over
        self._states_losses = False  # whether losses are stated by `update`
        self._was_recorded = self._is_open = False  # in this step; at this moment
        self._rule: Rule | None = None  # made for the blocks and inverses that there are

    @property
    def state(self) -> KFACState:
        """What is carried from step to step."""
        return self._state

    @property
    def step(self) -> int:
        """Number of finished steps (calls of `precondition`)."""
        return self._state.step

    @property
    def failures(self) -> dict[str, int]:
        """Updates that were dropped so far, by kind: "statistics", "inverse" and "memory"."""
        return self._state.failures

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far in "factors", "inverses" and "precondition".

        On a GPU the time to launch the work, since nothing waits for it.
        """
        return self._state.seconds

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> trainable parameter."""
        return self._seen.parameters

    @property
    def structure(self) -> Structure:
        """The blocks that the parameters are in; known after the first recorded pass."""
        return self._seen.structure

    def follow_parameters(self) -> None:
        """Follows parameters that were replaced, added, frozen or unfrozen; `record` does it."""
        self._seen.follow()

    # ---- what is due ------------------------------------------------------------------------

    @property
    def damping(self) -> float:
        """λ in use. Setting it makes the next `precondition` renew the inverses."""
        return self._state.damping

    @damping.setter
    def damping(self, value: float) -> None:
        check_damping(value)
        self._state.damping_changed |= value != self._state.damping
        self._state.damping = value

    @property
    def factors_due(self) -> bool:
        """Whether this step updates the factors.

        Also when parameters were frozen or unfrozen since the last update.
        """
        return (
            self._due(self.config.factor_update_steps)
            or self._pass is not None
            or self._seen.is_outdated
        )

    @property
    def inverses_due(self) -> bool:
        """Whether this step renews inverses, or begins a round of them (renewal "in_turns")."""
        return self._due(self.config.inverse_update_steps)

    def _due(self, interval: int) -> bool:
        return is_due(self._state.step, interval, early=self.config.early_updates)

    # ---- one step: recording -------------------------------------------------------------------

    @contextmanager
    def record(self, sharing: SharingRule = None) -> Iterator[None]:
        """Records the forward pass inside, if this step updates the factors.

        Losses of torch's that are computed inside are seen: then `update` is not needed.

        Args:
            sharing: how rows share weights where the first dimension does not count the examples
                (graphs, padded sequences): see `sharing.resolve`.

        Raises:
            SharingError: it names a layer that there is not.
            CompiledModelError: the whole step is compiled, this call with it.
        """
        if self._pass is not None and self._pass.waits_for_loss:
            logger.warning(of_step.DROPPED)
            self._drop_pass()
        self._end_pass()
        if not self.factors_due:
            return (yield)
        self._seen.follow()
        check_names(sharing, self._seen.names)
        recording = Recording(self._seen.tracked)
        self._is_open = True
        try:
            may_sum = sharing is None and self._statistics.comes_with_loss
            with self._seen.followed_by(recording, may_sum=may_sum):
                yield
        except BaseException:
            recording.release()
            raise
        finally:
            self._is_open = False
        self._pass = RecordedPass(recording, sharing)
        self._was_recorded = True
        losses = usable(recording.losses, self.config.fisher_type, warns=not self._state.step)
        if losses and not self._states_losses:
            self._collect(losses, is_seen=True)

    def update(
        self,
        logits: Tensor,
        likelihood: Likelihood | str,
        *,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> None:
        """States the loss of a recorded forward pass; does nothing on steps without factors.

        Call it before the loss's backward pass, which needs the same graph. It wins over losses
        that were seen. Several losses of one pass are stated one by one; their curvatures add up.

        Args:
            logits: what goes into the loss.
            likelihood: "categorical", "bernoulli", "gaussian" or a `Likelihood`.
            mask: which terms count (bool or weights), see `likelihoods`.
            targets: the labels, for fisher_type="empirical" and ignore_index only.
            loss: what the one backward pass before the next `record` or `precondition` starts from,
                or a multiple (not with `OwnGradients`): it may save a Fisher pass.

        Raises:
            RuntimeError: the forward pass was not recorded, or the logits have no graph of it.
        """
        if not self.factors_due:
            return
        likelihood = as_likelihood(likelihood)
        if self._pass is None:
            raise RuntimeError(of_step.NOT_RECORDED)
        if not logits.requires_grad:
            raise RuntimeError(of_step.NO_GRAPH)
        self._states_losses = True
        check_statement(self._pass.recording.losses, logits, likelihood)
        if self._state.step == 0:
            check_class_dim(logits, likelihood)
        self._collect([LossTerms(logits, likelihood, mask, targets, loss)], is_seen=False)

    @timed("factors")
    def _collect(self, losses: list[LossTerms], *, is_seen: bool) -> None:
        """Takes the statistics of losses of the last recorded pass."""
        recorded, state = self._pass, self._state
        assert recorded is not None
        is_new = not recorded.losses or (recorded.is_seen and not is_seen)
        try:
            self._seen.discover(recorded, losses)
            if is_new:
                if self.config.factor_decay == 0 and not self._statistics.is_begun:
                    # The new sums take the memory of the old ones; inverses stay in any case.
                    self._seen.forget_averages(recorded)
                collection = self._seen.collection(recorded)
                self._statistics.begin(recorded, collection, state.step, is_seen)
            for loss in losses:
                self._statistics.collect(recorded, loss, alone=is_new and len(losses) == 1)
        except BaseException:
            self._was_recorded = False
            self._drop_pass()
            raise
        if is_seen:
            recorded.weigh()

    # ---- one step: from statistics to gradients --------------------------------------------------

    def _drop_pass(self) -> None:
        if self._pass is not None:
            self._pass.drop()
            self._pass = None

    @timed("factors")
    def _end_pass(self) -> None:
        """Takes over the statistics of the last recorded pass."""
        recorded, self._pass = self._pass, None
        if recorded is None:
            return
        if not recorded.losses:
            recorded.drop()
            return
        for name, words in recorded.collection.words().items():
            self._state.of(self.structure.by_name[name]).shared_over = words
        self._statistics.end_pass(recorded)

    def reduce_factors(self) -> None:
        """Starts to add up this step's statistics over the ranks, in the background.

        Optional: `precondition` does it. Call it after the last `update` of a step and before the
        loss's backward pass, which hides it. Does nothing where `update` was given the loss: on
        some rank the statistics may still have to come.
        """
        if collectives.world_size() == 1 or (self._pass is not None and self._pass.waits_for_loss):
            return
        self._end_pass()
        self._statistics.reduce_early(self._seen.empty_sums(), self._seen.discoveries)

    @torch.no_grad()
    def precondition(self) -> None:
        """Replaces the gradients by preconditioned ones and ends the step.

        First takes in the factors of this step, and renews the inverses when they are due: may
        raise what `refresh` does.
        """
        gradients = whole_gradients(self.parameters)
        done = self.directions(gradients)
        write([block for block, _ in done], [value for _, value in done], gradients)
        take_parts(self.parameters, gradients)

    @torch.no_grad()
    def directions(self, gradients: Mapping[str, Tensor | None]) -> list[tuple[Block, Tensor]]:
        """Ends the step; what is to stand in place of the gradients, for each block that has it.

        Args:
            gradients: name of a parameter -> gradient.
        """
        self.refresh()
        with own_products(self.config.factor_precision, self._device.type):
            done: list[tuple[Block, Tensor]] = self._directions(gradients)
        return done

    @timed("precondition")
    def _directions(self, gradients: Mapping[str, Tensor | None]) -> list[tuple[Block, Tensor]]:
        if self._rule is None or self._rule.blocks is not self.structure.blocks:
            self._rule = self.config.rule(
                self._state, self.structure.blocks, self.parameters, self.config, self._seen.owners
            )
        return self._rule.directions(gradients)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes in the factors of this step, renews the inverses when they are due, ends the step.

        `precondition` does it first.

        Raises:
            KFACError: `max_failures` updates in a row had to be dropped.
            RuntimeError: this step was to update the factors, but nothing was recorded, no loss is
                known, or its backward pass has not come; or `record` has not ended.
        """
        with own_products(self.config.factor_precision, self._device.type):
            self._refresh()

    def _refresh(self) -> None:
        if self._is_open:
            raise RuntimeError(of_step.STILL_OPEN)
        if self._pass is not None and self._pass.waits_for_loss:
            self._drop_pass()
            raise RuntimeError(of_step.NOT_COME)
        self._check_recorded()
        self._end_pass()
        troubles: list[Trouble] = []
        start = time.perf_counter()
        total = take_in(
            self._state, self._seen, self._statistics, self.config.factor_decay, troubles
        )
        factors_done = time.perf_counter()
        state, config = self._state, self.config
        moved = refresh_inverses(state, self._seen, config, troubles)
        if total is not None and config.eigenvalue_correction:
            correct_eigenvalues(state, self._seen.observed_blocks, total, config.factor_decay)
            moved = True
        if moved:
            self._rule = None
        state.step += 1
        self._was_recorded = False
        state.seconds["factors"] += factors_done - start
        state.seconds["inverses"] += time.perf_counter() - factors_done
        account(state, troubles, updated=total is not None, max_failures=config.max_failures)

    def _check_recorded(self) -> None:
        """Whether a step that updates the factors has what it takes."""
        if not self._due(self.config.factor_update_steps) or self._statistics.is_begun:
            return
        if not self._was_recorded:
            raise RuntimeError(of_step.NOT_RECORDED)
        if self._pass is not None and not self._pass.losses:
            self._drop_pass()
            raise RuntimeError(of_step.NO_LOSS)

    # ---- what it holds ----------------------------------------------------------------------

    def curvature(self) -> dict[str, Curvature]:
        """Name of a block -> a copy of its current curvature."""
        found = {}
        for block in self.structure.blocks:
            curvature = self._state.of(block).curvature
            if curvature is not None:
                found[block.name] = block.public(curvature)
        return found

    def report(self) -> list[ReportRow]:
        """What preconditions every parameter; known after the first update."""
        return report_rows(self.structure, self.config, self._state)

    def describe(self) -> str:
        """The report as a text table."""
        return f"{format_report(self.report())}\nupdate rule: {self.config.direction}"

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the graph of a pass, and what is made from the state again."""
        return {**self.__dict__, "_pass": None, "_rule": None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain Python values only."""
        return {**self._state.to_dict(), "seed": self.config.seed, **self._seen.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; tensors move to the device of the parameters.

        Raises:
            ValueError: the state belongs to another version, approximation or model.
        """
        restored = self._seen.restore(state, self._device)
        self._drop_pass()
        self._statistics.forget()
        if state["seed"] != self.config.seed:  # a run that goes on samples the same labels
            self.config = replace(self.config, seed=int(state["seed"]))
            self._statistics.config = self.config
        self._state, self._rule = restored, None
