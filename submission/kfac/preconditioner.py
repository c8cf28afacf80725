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
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import updates
from .adaptive_damping import Trial, adapted_damping, begin_trial, predicted_change
from .blocks.block import Block
from .blocks.public import Curvature
from .blocks.structure import Structure
from .config import KFACConfig, check_damping
from .failures import Trouble, account
from .fisher.likelihoods import Likelihood, as_likelihood
from .fisher.losses import LossTerms, check_class_dim, terms_of
from .fisher.step import Accumulated, FisherSettings, RecordedPass, StepStatistics
from .operations.record import Recording
from .operations.sharing import SharingRule, check_names
from .ranks import collectives
from .report import ReportRow, format_report, report_rows
from .seen_model import SeenModel
from .state import KFACState

logger = logging.getLogger(__name__)

NOT_RECORDED = (
    "this step updates the factors, but its forward pass was not recorded: run it inside "
    "`with {}.record():`"
)
NO_LOSS = (
    "this step updates the factors, but no loss is known: compute it by one of torch's functions "
    "(cross_entropy, binary_cross_entropy_with_logits, mse_loss, nll_loss) inside record(), or "
    "state it after record() by update(logits, likelihood)"
)


class CompiledModelError(RuntimeError):
    """The model that was recorded is compiled: its operations cannot be seen."""


class Preconditioner:
    """Kronecker-factored preconditioner of a model's gradients.

    With `KFACConfig(direction="eigenbasis_adam")` it writes Adam's update in the eigenbasis of the
    factors in place of the preconditioned gradient.

    Args:
        model: any module; wrappers of DDP and torch.compile are looked through.
        config: see `KFACConfig`.

    Attributes:
        config: the settings; `damping` may change during training, see the property.
    """

    def __init__(self, model: nn.Module, config: KFACConfig | None = None) -> None:
        self.config = config or KFACConfig()
        approx = self.config.kfac_approx
        self._state = KFACState(self.config.damping, None if approx == "auto" else approx)
        self._seen = SeenModel(model, self.config, self._state)
        self._device = next(iter(self.parameters.values())).device
        self._statistics = StepStatistics(self._fisher_settings, self._device)
        self._pass: RecordedPass | None = None  # the last recorded one, until it is taken over
        self._states_losses = False  # whether losses are stated by `update`
        self._was_recorded = False  # in this step
        self._work: updates.Work | None = None  # made for the structure that it came from

    @property
    def _fisher_settings(self) -> FisherSettings:
        config = self.config
        return FisherSettings(config.fisher_type, config.mc_samples, config.seed)

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
        """Whether this step renews the inverses."""
        return self._due(self.config.inverse_update_steps)

    def _due(self, interval: int) -> bool:
        # Curvature changes fastest at the start (a zero-initialised head gives the layers below
        # it no curvature at all in step 0), so the first interval has updates at 0, 1, 2, 4, 8, ...
        early = self.config.early_updates and self._state.step < interval
        return self._state.step % interval == 0 or (
            early and self._state.step & (self._state.step - 1) == 0
        )

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
            CompiledModelError: the model is compiled, and none of its operations was seen.
        """
        if self._pass is not None and self._pass.waits_for_loss:
            logger.warning(
                "K-FAC: the statistics of a recorded pass are dropped: they were to come from the "
                "backward pass of its loss, which has not come (to its end) before the next "
                "record()"
            )
            self._drop_pass()
        self._end_pass()
        if not self.factors_due:
            yield
            return
        self._seen.follow()
        check_names(sharing, self._seen.names)
        recording = Recording(self._seen.tracked)
        try:
            with _uncompiled(), recording:
                yield
        except BaseException:
            recording.release()
            raise
        if self._seen.is_compiled and not recording.calls:
            raise CompiledModelError(
                "the model is compiled, so its operations cannot be seen: call the uncompiled "
                "module inside record() (`model._orig_mod` of torch.compile's result), or use "
                "PyTorch 2.6 or newer"
            )
        self._pass = RecordedPass(recording, sharing)
        self._was_recorded = True
        if recording.losses and not self._states_losses:
            self._collect([terms_of(seen) for seen in recording.losses], is_seen=True)

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
            loss: what the caller's backward pass starts from, or a multiple of it, if there will
                be just one before the next `record` or `precondition`. Where the statistics can
                come from that pass (see `fisher.loss_pass`), no Fisher pass is made.

        Raises:
            RuntimeError: this step needs factors, but the forward pass was not recorded, or the
                logits have no graph of it.
        """
        if not self.factors_due:
            return
        likelihood = as_likelihood(likelihood)
        if self._pass is None:
            raise RuntimeError(NOT_RECORDED.format("kfac"))
        if not logits.requires_grad:
            raise RuntimeError(
                "the logits have no graph: they are detached, or were computed under no_grad"
            )
        self._states_losses = True
        if self._state.step == 0:
            check_class_dim(logits, likelihood)
        self._collect([LossTerms(logits, likelihood, mask, targets, loss)], is_seen=False)

    def _collect(self, losses: list[LossTerms], *, is_seen: bool) -> None:
        """Takes the statistics of losses of the last recorded pass."""
        start = time.perf_counter()
        recorded, state = self._pass, self._state
        assert recorded is not None
        is_new = not recorded.losses or (recorded.is_seen and not is_seen)
        self._seen.discover(recorded, losses)
        if is_new:
            if self.config.factor_decay == 0 and not self._statistics.is_begun:
                # Without a moving average the new sums take the memory of the old ones. If this
                # update fails the inverses stay in use.
                self._seen.forget_averages(recorded)
            collection = self._seen.collection(recorded)
            self._statistics.begin(recorded, collection, state.step, is_seen)
        alone = is_new and len(losses) == 1
        for loss in losses:
            self._statistics.collect(recorded, loss, alone=alone)
        if is_seen and len(losses) > 1:
            for number in range(len(losses)):
                recorded.weigh(number)
        state.seconds["factors"] += time.perf_counter() - start

    # ---- one step: from statistics to gradients --------------------------------------------------

    def _drop_pass(self) -> None:
        if self._pass is not None:
            self._pass.drop()
            self._pass = None

    def _end_pass(self) -> None:
        """Takes over the statistics of the last recorded pass."""
        recorded, self._pass = self._pass, None
        if recorded is None:
            return
        if not recorded.losses:
            recorded.drop()
            return
        start = time.perf_counter()
        for name, words in recorded.collection.words().items():
            self._state.of(self.structure.by_name[name]).shared_over = words
        self._statistics.end_pass(recorded)
        self._state.seconds["factors"] += time.perf_counter() - start

    def reduce_factors(self) -> None:
        """Starts to add up this step's statistics over the ranks, in the background.

        Optional: `precondition` does it otherwise. Call it after the last `update` of a step and
        before the loss's backward pass, which then hides the communication. Does nothing in a step
        in which `update` was given the loss: on some rank the statistics may still have to come.
        """
        if collectives.world_size() == 1 or (self._pass is not None and self._pass.waits_for_loss):
            return
        self._end_pass()
        self._statistics.reduce_early(self._seen.empty_sums(), self._seen.discoveries)

    @torch.no_grad()
    def precondition(self) -> None:
        """Replaces the gradients by preconditioned ones and ends the step.

        First takes in the factors of this step, and renews the inverses when they are due.

        Raises:
            KFACError: `max_failures` updates in a row had to be dropped.
        """
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        updates.write_done(self.directions(gradients), gradients)

    @torch.no_grad()
    def directions(self, gradients: Mapping[str, Tensor | None]) -> list[tuple[Block, Tensor]]:
        """Ends the step; what is to stand in place of the gradients, for each block that has it.

        Args:
            gradients: name of a parameter -> gradient.
        """
        self.refresh()
        start = time.perf_counter()
        device = torch.device(self._device).type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            adam = self.config.direction == "eigenbasis_adam"
            if self._work is None or self._work.blocks is not self.structure.blocks:
                self._work = updates.make_work(
                    self._state, self.structure.blocks, self.parameters, adam
                )
            if adam:
                done = updates.eigenbasis_steps(self._state, self._work, gradients, self.config)
            else:
                alone = self._seen.owners if self.config.inverse_placement == "one_rank" else {}
                done = updates.preconditioned(
                    self._state, self._work, self.structure.blocks, alone, gradients
                )
        self._state.seconds["precondition"] += time.perf_counter() - start
        return done

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes in the factors of this step, renews the inverses when they are due, ends the step.

        For update rules that work in the eigenbasis of the factors themselves; `precondition`
        does it first.

        Raises:
            KFACError: `max_failures` updates in a row had to be dropped.
            RuntimeError: this step was to update the factors, but nothing was recorded, or no loss
                is known, or its backward pass has not come.
        """
        device = torch.device(self._device).type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            self._refresh()

    def _refresh(self) -> None:
        if self._pass is not None and self._pass.waits_for_loss:
            self._drop_pass()
            raise RuntimeError(
                "the statistics of the recorded pass are to come from the backward pass of its "
                "loss, which has not come: call loss.backward() before this step ends, or leave "
                "`loss` out of update"
            )
        self._check_recorded()
        self._end_pass()
        troubles: list[Trouble] = []
        start = time.perf_counter()
        total = self._take_in(troubles)
        factors_done = time.perf_counter()
        # All of this is the same on every rank; which inverses a rank holds is not.
        state, config = self._state, self.config
        known = any(block.curvature is not None for block in state.blocks.values())
        renew = self.inverses_due or state.inverses_stale
        if state.damping_changed and config.damping_kind == "exact" and not renew:
            updates.renew_damping(state, self._seen.preconditioned, config)
            self._work = None
        elif known and (renew or state.damping_changed):
            lost = updates.renew_inverses(
                state, self._seen.preconditioned, self._seen.owners, config
            )
            self._work = None
            if lost:
                names = ", ".join(f"'{name}'" for name in lost)
                troubles.append(Trouble("inverse", f"the factors of {names} could not be inverted"))
        if total is not None and config.eigenvalue_correction:
            updates.correct_eigenvalues(
                state, self._seen.observed_blocks, total, config.factor_decay
            )
            self._work = None
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
            raise RuntimeError(NOT_RECORDED.format("kfac"))
        if self._pass is not None and not self._pass.losses:
            self._drop_pass()
            raise RuntimeError(NO_LOSS)

    def _take_in(self, troubles: list[Trouble]) -> Accumulated | None:
        """Takes the step's statistics, summed over ranks, into the averages.

        Returns them if they were good, otherwise adds to the troubles.
        """
        alone = collectives.world_size() == 1
        total, discovered = self._statistics.finish(
            self._seen.empty_sums(), self._seen.discoveries, alone=alone
        )
        if total is None:
            return None
        good = updates.average_in(
            self._state, total, self._seen.observed_blocks, self.config.factor_decay
        )
        if discovered:
            self._seen.share_discoveries()
        if good:
            return total
        if total.is_out_of_memory_on_a_rank():
            self._state.examples_share /= 2
            share = f"{100 * self._state.examples_share:g} %"
            where = total.out_of_memory or "the factors of another rank"
            message = f"memory ran out in {where}; from now on {share} of the examples are used"
            troubles.append(Trouble("memory", message))
        else:
            message = "the batch gave non-finite statistics or had no valid label"
            if self._statistics.look_at_loss_again():
                message += ", or its loss was not a multiple of the likelihood's"
            troubles.append(Trouble("statistics", message))
        return None

    # ---- adaptive damping -------------------------------------------------------------------

    @torch.no_grad()
    def begin_trial(self) -> Trial:
        """Remembers gradients and parameters of this step, for `end_trial`.

        Call it after the backward pass and before `precondition`.
        """
        return begin_trial(self.structure.blocks, self.parameters)

    @torch.no_grad()
    def end_trial(self, trial: Trial, loss_before: float, loss_after: float) -> float:
        """Adapts the damping to how well the step went (see `adaptive_damping`).

        Args:
            trial: of `begin_trial`, before the parameters were changed.
            loss_before, loss_after: the mean loss of the same batch (same dropout) around the step.

        Returns:
            The reduction ratio; NaN for a step that changed nothing, which leaves the damping.
        """
        settings = updates.settings_of(self._state, self.config, 1)
        blocks = self.structure.blocks
        predicted = predicted_change(blocks, self._state, trial, self.parameters, settings)
        if predicted == 0 and loss_after == loss_before:
            return float("nan")
        ratio = (loss_after - loss_before) / predicted if predicted < 0 else float("-inf")
        steps = self.config.inverse_update_steps
        self.damping = adapted_damping(self._state.damping, ratio, steps)
        return ratio

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
        return format_report(self.report())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain Python values only."""
        return {
            **self._state.to_dict(),
            "kfac_approx": self.config.kfac_approx,
            "parameters": list(self.parameters),
            "inverses_complete": not self._shares_inverses,
            "seed": self.config.seed,
        }

    @property
    def _shares_inverses(self) -> bool:
        return self.config.inverse_placement == "one_rank" and bool(self._seen.owners)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; tensors move to the device of the parameters.

        Raises:
            ValueError: the state belongs to another version, approximation or model.
        """
        restored = KFACState.from_dict(state, self._device)
        if state["kfac_approx"] != self.config.kfac_approx:
            raise ValueError(
                f"K-FAC state was made with kfac_approx={state['kfac_approx']!r}, not "
                f"{self.config.kfac_approx!r}"
            )
        self._seen.check(restored, list(state["parameters"]))
        self._drop_pass()
        self._statistics.forget()
        if state["seed"] != self.config.seed:
            # Labels would be sampled otherwise than in the run that goes on.
            self.config = replace(self.config, seed=int(state["seed"]))
            self._statistics.settings = self._fisher_settings
        if not state["inverses_complete"]:
            # It has those of one rank: all make theirs anew, at the same step.
            restored.inverses_stale = True
        self._state, self._work = restored, None
        self._seen.begin_with(restored)
        if self._shares_inverses:
            for name, owner in self._seen.owners.items():
                if owner != collectives.rank():
                    restored.of(self.structure.by_name[name]).inverse = None


def _uncompiled() -> Any:
    """Runs compiled modules as they were before, where this PyTorch can."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:  # nothing is compiled then
        return nullcontext()
    return set_stance("force_eager")
