"""KFAC: the object that a training loop holds.

It owns all state (factors, inverses, counters, the label sampler) and orchestrates the pure parts
of this package. One step of training:

    with kfac.record():                      # hooks only on the steps that need factors
        logits = model(x)
    kfac.update(logits, likelihood="categorical")   # Fisher pass, on those steps
    loss_fn(logits, y).backward()            # the ordinary gradient of the mean loss
    kfac.precondition()                      # p.grad <- (curvature + damping)^-1 p.grad
    optimizer.step()

With fisher_type="empirical", `kfac.update(..., targets=y, loss=loss)` lets the statistics come from
the loss's own backward pass, and no Fisher pass is made.

With gradient accumulation, record, update and backward are repeated before one `precondition`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, updates
from .accumulation import Accumulated
from .adaptive_damping import Trial, adapted_damping, begin_trial, predicted_change
from .batches import Batch
from .capture import Recording
from .config import KFACConfig, check_damping
from .curvature import Curvature, as_curvature
from .failures import Trouble, account
from .gradient_rules import make_state_batches, write_eigenbasis_steps, write_preconditioned
from .likelihoods import Likelihood, as_likelihood
from .model_parts import ModelParts
from .old_inverses import OldInverses
from .partition import unwrap
from .recorder import is_compiled, record
from .renewal import InverseRenewal
from .report import ReportRow, format_report, report_rows
from .setting import detect_setting, warn_of_folded_positions
from .sharing import SharingRule
from .state import KFACState
from .statistics import Part
from .step_statistics import StepStatistics

logger = logging.getLogger(__name__)


class KFAC:
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
        self._model = unwrap(model)
        approx = self.config.kfac_approx
        self._state = KFACState(self.config.damping, None if approx == "auto" else approx)
        self._compiled = is_compiled(model)
        self._parts = ModelParts(self._model, self.config)
        self._parts.split(self._state.approx or "expand", None)
        self._recordings: dict[str, Recording] = {}
        self._sharing: SharingRule = None
        self._device = next(self._model.parameters()).device
        self._statistics = StepStatistics(self._model, self.config, self._device)
        self._renewal = InverseRenewal(self.config)
        self._lost: list[str] = []  # parts whose inverse could not be made, until it is reported
        self._old_inverses = OldInverses()
        self._batches: list[Batch] | None = None  # of the state's tensors; made anew when they are

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
            or bool(self._recordings)
            or self._parts.is_outdated
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

    # ---- one step ---------------------------------------------------------------------------

    @contextmanager
    def record(self, sharing: SharingRule = None) -> Iterator[None]:
        """Records the forward pass inside, if this step updates the factors.

        Args:
            sharing: how rows share weights where the first dimension does not count the examples
                (graphs, padded sequences): see `sharing.resolve`.

        Raises:
            SharingError: it names a layer that there is not.
        """
        self._end_loss_pass()
        if self._statistics.waits_for_loss:
            logger.warning(
                "K-FAC: the statistics of a recorded pass are dropped: update was given its loss, "
                "whose backward pass has not come (to its end) before the next record()"
            )
        self._drop_recordings()
        self._sharing = sharing
        if not self.factors_due:
            yield
            return
        if self._parts.is_outdated:
            self._split()
            self._state.inverses_stale = True
        if self.inverses_due and not self.config.background_inverses:
            self._batches = None  # they hold what is being packed
            self._old_inverses.pack(self._state.inverses)
        # "auto" is decided by the first outputs: until then both approximations are recorded.
        if self._state.approx is not None:
            observed = {self._state.approx: self._parts.observed}
        else:
            observed = {
                approx: [p for p in self._parts.whole(approx).parts if self._parts.is_observed(p)]
                for approx in ("expand", "reduce")
            }
        with record(
            self._model,
            self.config,
            observed,
            sharing=sharing,
            watched=self._parts.watched,
            examples_share=self._state.examples_share,
            compiled=self._compiled,
            called=self._forget_average,
        ) as recordings:
            yield
        self._recordings = recordings

    def _drop_recordings(self) -> None:
        """Lets go of recordings that were not used, and of the graphs that they keep alive."""
        for recording in self._recordings.values():
            recording.release()
        self._recordings = {}
        self._statistics.drop_loss_pass()

    def _forget_average(self, name: str) -> None:
        """A part is being called: without a moving average the new sums take its average's memory.

        If this update fails its inverse stays in use.
        """
        alone = distributed.world_size() == 1  # ranks may call different layers
        if alone and self.config.factor_decay == 0 and not self._statistics.is_begun:
            self._state.averages.pop(name, None)

    def _split(self) -> None:
        self._state.inverses_stale |= self._renewal.drop()
        before = {part.name: type(part) for part in self._parts.partition.parts}
        self._parts.split(self._state.approx or "expand", self._state.called)
        # A parameter and a map inside a fused module may have the same name.
        now = {part.name: type(part) for part in self._parts.partition.parts}
        self._state.keep_only([name for name in now if before.get(name) is now[name]])
        self._batches = None

    def update(
        self,
        logits: Tensor,
        likelihood: Likelihood | str,
        *,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> None:
        """Runs the Fisher pass of a recorded forward pass; does nothing on other steps.

        Call it before the loss's backward pass, which needs the same graph.

        Args:
            logits: the model's output.
            likelihood: "categorical", "bernoulli", "gaussian" or a `Likelihood`.
            mask: which terms count (bool or weights), see `likelihoods`.
            targets: the labels, for fisher_type="empirical" and ignore_index only.
            loss: what the caller's backward pass starts from, or a multiple of it, if there will
                be just one before the next `record` or `precondition`. Where the statistics can
                come from that pass (see `loss_pass`), no Fisher pass is made.

        Raises:
            RuntimeError: this step needs factors, but the forward pass was not recorded, or the
                logits have no graph of it.
        """
        if not self.factors_due:
            return
        likelihood = as_likelihood(likelihood)
        if not self._recordings:
            raise RuntimeError("KFAC.update needs a forward pass inside `with kfac.record():`")
        if not logits.requires_grad:
            raise RuntimeError(
                "the logits have no graph: they are detached, or were computed under no_grad"
            )
        recordings, self._recordings = self._recordings, {}
        start = time.perf_counter()
        if self._state.approx is None:
            examples = recordings["expand"].examples.values()
            self._decide_setting(likelihood, logits, examples)
        assert self._state.approx is not None
        recording = recordings[self._state.approx]
        if self._state.called is None or self._parts.uncalled:
            recording.find_other_uses(logits)
        if self._state.called is None:
            self._find_called_layers(recording)
            if self._sharing is None and self._state.approx == "reduce":
                warn_of_folded_positions(recording.examples, likelihood, logits)
        self._state.shared_over.update(recording.shared_over())
        self._statistics.collect(
            recording,
            logits,
            likelihood,
            step=self._state.step,
            mask=mask,
            targets=targets,
            loss=loss,
        )
        for other in recordings.values():
            if other is not recording:
                other.release()
        self._state.seconds["factors"] += time.perf_counter() - start

    def _end_loss_pass(self) -> None:
        start = time.perf_counter()
        self._statistics.end_loss_pass()
        self._state.seconds["factors"] += time.perf_counter() - start

    def _decide_setting(
        self, likelihood: Likelihood, logits: Tensor, examples: Iterable[int]
    ) -> None:
        approx, reason = detect_setting(likelihood, logits, self._sharing, examples)
        self._state.approx = approx
        self._split()
        logger.info("K-FAC-%s is chosen: %s", self._state.approx, reason)

    def _find_called_layers(self, recording: Recording) -> None:
        """Finds out, over all ranks, which layers the first recorded pass has called."""
        called = self._parts.called_on_any_rank(recording)
        if called is None:
            return
        self._state.called = called
        self._split()
        recording.replace(self._parts.observed)
        if self._parts.uncalled:
            logger.warning(
                "K-FAC: not called as modules in the first recorded pass, or used besides these "
                "calls, so their parameters have a curvature of their own: %s",
                ", ".join(part.name for part in self._parts.uncalled),
            )

    def reduce_factors(self) -> None:
        """Starts to add up this step's statistics over the ranks, in the background.

        Optional: `precondition` does it otherwise. Call it after the last `update` of a step and
        before the loss's backward pass, which then hides the communication. Does nothing in a step
        in which `update` was given the loss: on some rank the statistics may still have to come.
        """
        self._statistics.reduce_early(self._parts.observed, self._parts.uncalled)

    @torch.no_grad()
    def precondition(self) -> None:
        """Replaces the gradients by preconditioned ones and ends the step.

        First takes in the factors of this step, and renews the inverses when they are due.

        Raises:
            KFACError: `max_failures` updates in a row had to be dropped.
        """
        self.refresh()
        start = time.perf_counter()
        if self._batches is None:
            self._batches = make_state_batches(self._state, self._parts, self.config)
        if self.config.direction == "eigenbasis_adam":
            write_eigenbasis_steps(self._state, self._batches, self.config)
        else:
            write_preconditioned(self._state, self._batches, self._parts, self.config)
        self._state.seconds["precondition"] += time.perf_counter() - start

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes in the factors of this step, renews the inverses when they are due, ends the step.

        For update rules that work in the eigenbasis of the factors themselves; `precondition`
        does it first.

        Raises:
            KFACError: `max_failures` updates in a row had to be dropped.
        """
        self._end_loss_pass()
        if self._statistics.waits_for_loss:
            self._drop_recordings()
            raise RuntimeError(
                "KFAC.update was given the loss, whose backward pass has not come: call "
                "loss.backward() before precondition, or leave `loss` out of update"
            )
        self._drop_recordings()
        troubles: list[Trouble] = []
        start = time.perf_counter()
        self._finish_inverses()
        waited = time.perf_counter() - start
        accumulated = self._take_in(troubles)
        factors_done = time.perf_counter()
        # All of this is the same on every rank; which inverses a rank holds is not.
        is_exact = self.config.damping_kind == "exact"
        renew = self.inverses_due or self._state.inverses_stale
        if self._state.damping_changed and is_exact and not renew:
            updates.renew_damping(self._state, self._preconditioned(), self.config)
            self._batches = None
        elif self._state.averages and (renew or self._state.damping_changed):
            self._renewal.begin(self._state, self._preconditioned(), self._parts.owners)
            if not self._renewal.in_background:
                self._finish_inverses()
        if self._lost:
            names = ", ".join(f"'{name}'" for name in self._lost)
            troubles.append(Trouble("inverse", f"the factors of {names} could not be inverted"))
            self._lost = []
        if accumulated is not None and self.config.eigenvalue_correction:
            assert accumulated.terms is not None
            updates.correct_eigenvalues(
                self._state,
                self._parts.partition.parts,
                accumulated.rows,
                accumulated.terms,
                self.config.factor_decay,
            )
            self._batches = None
        self._old_inverses.restore(self._state.inverses)
        self._state.step += 1
        self._state.seconds["factors"] += factors_done - start - waited
        self._state.seconds["inverses"] += time.perf_counter() - factors_done + waited
        account(self._state, troubles, updated=accumulated is not None, config=self.config)

    def _finish_inverses(self) -> None:
        """Takes inverses into use that were begun to be made, in this step or the last one."""
        lost = self._renewal.finish(self._state, self._parts.partition.parts)
        if lost is not None:
            self._lost += lost
            self._batches = None

    def _preconditioned(self) -> list[Part]:
        """The parts that are not trained by their raw gradient."""
        partition = self._parts.partition
        raw = partition.reasons if self.config.fallback == "gradient" else {}
        return [part for part in partition.parts if part.name not in raw]

    def _take_in(self, troubles: list[Trouble]) -> Accumulated | None:
        """Takes the step's statistics, summed over ranks, into the averages.

        Returns them if they were good, otherwise adds to the troubles.
        """
        accumulated = self._statistics.finish(self._parts.observed, self._parts.uncalled)
        if accumulated is None:
            return None
        assert accumulated.terms is not None
        good = updates.average_in(
            self._state,
            self._parts.observed,
            accumulated.sums,
            accumulated.terms,
            self.config.factor_decay,
        )
        if good:
            self._promote(accumulated.newly_called())
            return accumulated
        if accumulated.is_out_of_memory_on_a_rank():
            self._state.examples_share /= 2
            share = f"{100 * self._state.examples_share:g} %"
            where = accumulated.out_of_memory or "the factors of another rank"
            message = f"memory ran out in {where}; from now on {share} of the examples are used"
            troubles.append(Trouble("memory", message))
        else:
            message = "the batch gave non-finite statistics or had no valid label"
            if self._statistics.look_at_loss_again():
                message += ", or its loss was not a multiple of the likelihood's"
            troubles.append(Trouble("statistics", message))
        return None

    def _promote(self, names: list[str]) -> None:
        """Layers that were called for the first time count as layers from now on."""
        if names and self._state.called is not None:
            self._state.called += names
            self._split()
            logger.info("K-FAC: called for the first time, now layers: %s", ", ".join(names))

    # ---- adaptive damping -------------------------------------------------------------------

    @torch.no_grad()
    def begin_trial(self) -> Trial:
        """Remembers gradients and parameters of this step, for `end_trial`.

        Call it after the backward pass and before `precondition`.
        """
        return begin_trial(self._parts.partition.parts)

    @torch.no_grad()
    def end_trial(self, trial: Trial, loss_before: float, loss_after: float) -> float:
        """Adapts the damping to how well the step went (see `adaptive_damping`).

        Args:
            trial: of `begin_trial`, before the parameters were changed.
            loss_before, loss_after: the mean loss of the same batch (same dropout) around the step.

        Returns:
            The reduction ratio.
        """
        parts, averages = self._parts.partition.parts, self._state.averages
        predicted = float(
            predicted_change(
                parts,
                averages,
                self._state.inverses,
                trial,
                damping=self._state.damping,
                relative=self.config.relative_damping,
            )
        )
        ratio = (loss_after - loss_before) / predicted if predicted < 0 else float("-inf")
        steps = self.config.inverse_update_steps
        self.damping = adapted_damping(self._state.damping, ratio, steps)
        return ratio

    # ---- what it holds ----------------------------------------------------------------------

    def curvature(self) -> dict[str, Curvature]:
        """Name of a layer (or parameter outside layers) -> a copy of its current curvature."""
        return {
            part.name: as_curvature(
                part, {key: value.clone() for key, value in self._state.averages[part.name].items()}
            )
            for part in self._parts.partition.parts
            if part.name in self._state.averages
        }

    def report(self) -> list[ReportRow]:
        """What preconditions every parameter; the sharing is known after the first update."""
        adam = self.config.direction == "eigenbasis_adam"
        fallback = "adam" if adam else self.config.fallback
        return report_rows(self._parts.partition, fallback, self._state.shared_over)

    def describe(self) -> str:
        """The report as a text table."""
        return format_report(self.report())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain Python values only."""
        self._finish_inverses()
        self._old_inverses.restore(self._state.inverses)
        return {
            **self._state.to_dict(),
            "kfac_approx": self.config.kfac_approx,
            "parts": self._parts.names,
            "inverses_complete": not self._shares_inverses,
            "seed": self.config.seed,
        }

    @property
    def _shares_inverses(self) -> bool:
        return self.config.inverse_placement == "one_rank" and bool(self._parts.owners)

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
        parts = ModelParts(self._model, self.config)
        parts.split(restored.approx or "expand", restored.called)
        if parts.names != list(state["parts"]):
            differing = sorted(set(parts.names) ^ set(state["parts"]))
            raise ValueError(f"K-FAC state belongs to another model: it differs in {differing[:5]}")
        self._drop_recordings()
        self._renewal.drop()
        self._statistics.forget()
        self._batches, self._lost, self._old_inverses = None, [], OldInverses()
        if state["seed"] != self.config.seed:
            # Labels would be sampled otherwise than in the run that goes on.
            self.config = self._statistics.config = replace(self.config, seed=int(state["seed"]))
        if not state["inverses_complete"]:
            # It has those of one rank: all make theirs anew, at the same step.
            restored.inverses_stale = True
        self._state, self._parts = restored, parts
        if self._shares_inverses:
            for name, owner in parts.owners.items():
                if owner != distributed.rank():
                    restored.inverses.pop(name, None)
