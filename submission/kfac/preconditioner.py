"""KFAC: the object that a training loop holds.

It owns all state (factors, inverses, counters, the label sampler) and orchestrates the pure parts
of this package. One step of training:

    with kfac.record():                      # hooks only on the steps that need factors
        logits = model(x)
    kfac.update(logits, likelihood="categorical")   # Fisher pass, on those steps
    loss_fn(logits, y).backward()            # the ordinary gradient of the mean loss
    kfac.precondition()                      # p.grad <- (curvature + damping)^-1 p.grad
    optimizer.step()

With gradient accumulation, record, update and backward are repeated before one `precondition`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, inverses
from .adaptive_damping import Trial, adapted_damping, begin_trial, predicted_change
from .capture import Recording
from .config import KFACConfig
from .curvature import Curvature, as_curvature, average_sums
from .eigenvalue_correction import summed_eigenvalues
from .gradients import read_gradient, write_gradient
from .likelihoods import Likelihood, as_likelihood
from .partition import Partition, demote_uncalled, partition, unwrap
from .report import ReportRow, format_report, report_rows
from .setting import detect_setting
from .sharing import SharingRule
from .state import KFACState
from .statistics import RowPairs, Sums, add_sums

logger = logging.getLogger(__name__)


class KFACError(RuntimeError):
    """Training cannot go on: too many updates in a row failed."""


class KFAC:
    """Kronecker-factored preconditioner of a model's gradients.

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
        self._partition = self._make_partition("expand" if approx == "auto" else approx)
        self._recordings: dict[str, Recording] = {}
        self._sharing: SharingRule = None
        self._pending: dict[str, Sums] = {}
        self._pending_terms: Tensor | None = None
        self._pending_rows: dict[str, RowPairs] = {}
        device = next(self._model.parameters()).device
        self._generator = torch.Generator(device)
        self._generator.manual_seed(self.config.seed + distributed.rank())

    def _make_partition(self, approx: str) -> Partition:
        return partition(
            self._model,
            approx=approx,
            joint_bias=self.config.joint_bias,
            max_factor_side=self.config.max_factor_side,
        )

    @property
    def step(self) -> int:
        """Number of finished steps (calls of `precondition`)."""
        return self._state.step

    @property
    def failures(self) -> dict[str, int]:
        """Updates that were dropped so far, by kind: "statistics" and "inverse"."""
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
        if not value > 0:
            raise ValueError(f"damping must be positive, not {value}")
        self._state.inverses_stale = self._state.inverses_stale or value != self._state.damping
        self._state.damping = value

    @property
    def factors_due(self) -> bool:
        """Whether this step updates the factors."""
        return self._due(self.config.factor_update_steps)

    def _due(self, interval: int) -> bool:
        # Curvature changes fastest at the start (a zero-initialised head gives the layers below
        # it no curvature at all in step 0), so the first interval has updates at 0, 1, 2, 4, 8, ...
        early = self.config.early_updates and self._state.step < interval
        return self._state.step % interval == 0 or (
            early and self._state.step & (self._state.step - 1) == 0
        )

    @property
    def _keeps_rows(self) -> bool:
        """Whether factors may stay sums of few rows: not if averaged over time or added over ranks,
        nor if they are to be diagonalised."""
        config = self.config
        averaged = config.factor_decay > 0 or distributed.world_size() > 1
        return not averaged and config.damping_kind != "exact"

    # ---- one step ---------------------------------------------------------------------------

    @contextmanager
    def record(self, sharing: SharingRule = None) -> Iterator[None]:
        """Records the forward pass inside, if this step updates the factors.

        Args:
            sharing: how rows share weights where the first dimension does not count the examples
                (graphs, padded sequences): see `sharing.resolve`.
        """
        self._recordings = {}
        self._sharing = sharing
        if not self.factors_due:
            yield
            return
        # "auto" is decided by the first outputs: until then both approximations are recorded.
        partitions = (
            {self._state.approx: self._partition}
            if self._state.approx is not None
            else {approx: self._make_partition(approx) for approx in ("expand", "reduce")}
        )
        recordings = {
            approx: Recording(
                self._model,
                candidate.parts,
                sharing,
                self.config.ragged_scaling,
                low_rank=self._keeps_rows,
                keep_rows=self.config.eigenvalue_correction,
            )
            for approx, candidate in partitions.items()
        }
        with ExitStack() as stack:
            for recording in recordings.values():
                stack.enter_context(recording)
            yield
        self._recordings = recordings

    def update(
        self,
        logits: Tensor,
        likelihood: Likelihood | str,
        *,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Runs the Fisher pass of a recorded forward pass; does nothing on other steps.

        Call it before the loss's backward pass, which needs the same graph.

        Args:
            logits: the model's output.
            likelihood: "categorical", "bernoulli", "gaussian" or a `Likelihood`.
            mask: which terms count (bool or weights), see `likelihoods`.
            targets: the labels, for fisher_type="empirical" and ignore_index only.

        Raises:
            RuntimeError: this step needs factors, but the forward pass was not recorded.
        """
        if not self.factors_due:
            return
        recordings, self._recordings = self._recordings, {}
        if not recordings:
            raise RuntimeError("KFAC.update needs a forward pass inside `with kfac.record():`")
        start = time.perf_counter()
        likelihood = as_likelihood(likelihood)
        if self._state.approx is None:
            self._decide_setting(likelihood, logits)
        assert self._state.approx is not None
        recording = recordings[self._state.approx]
        vectors = likelihood.would_be_gradients(
            logits,
            fisher_type=self.config.fisher_type,
            mc_samples=self.config.mc_samples,
            mask=mask,
            targets=targets,
            generator=self._generator,
        )
        if not self._state.shared_over:
            self._state.shared_over = recording.shared_over()
            self._partition = demote_uncalled(self._partition, recording.calls)
            recording.replace_uncalled(self._partition.parts)
        for vector in vectors:
            recording.fisher_pass(logits, vector, zero_mean=self.config.fisher_type == "mc")
        for name, sums in recording.sums.items():
            if name in self._pending:
                add_sums(self._pending[name], sums)
            else:
                self._pending[name] = sums
        for name, pairs in recording.row_pairs().items():
            self._pending_rows.setdefault(name, []).extend(pairs)
        terms = likelihood.terms(logits.detach(), mask, targets)
        self._pending_terms = terms if self._pending_terms is None else self._pending_terms + terms
        recording.release()
        self._state.seconds["factors"] += time.perf_counter() - start

    def _decide_setting(self, likelihood: Likelihood, logits: Tensor) -> None:
        self._state.approx, reason = detect_setting(likelihood, logits, self._sharing)
        self._partition = self._make_partition(self._state.approx)
        logger.info("K-FAC-%s is chosen: %s", self._state.approx, reason)

    @torch.no_grad()
    def precondition(self) -> None:
        """Replaces the gradients by preconditioned ones and ends the step.

        First takes in the factors of this step, and renews the inverses when they are due.

        Raises:
            KFACError: `max_failures` updates in a row had to be dropped.
        """
        start = time.perf_counter()
        terms, rows = self._pending_terms, self._pending_rows
        self._pending_rows = {}
        accepted = terms is not None and self._take_in_pending(terms)
        factors_done = time.perf_counter()
        if self._state.averages and (
            self._due(self.config.inverse_update_steps)
            or not self._state.inverses
            or self._state.inverses_stale
        ):
            self._renew_inverses()
        if accepted and terms is not None and self.config.eigenvalue_correction:
            self._correct_eigenvalues(rows, terms)
        inverses_done = time.perf_counter()
        for part in self._partition.parts:
            inverse = self._state.inverses.get(part.name)
            gradient = None if inverse is None else read_gradient(part)
            if inverse is not None and gradient is not None:
                result = inverses.precondition(part, inverse, gradient.to(_dtype(inverse)))
                write_gradient(part, result)
        self._state.step += 1
        self._state.seconds["factors"] += factors_done - start
        self._state.seconds["inverses"] += inverses_done - factors_done
        self._state.seconds["precondition"] += time.perf_counter() - inverses_done

    # ---- adaptive damping -------------------------------------------------------------------

    @property
    def inverses_due(self) -> bool:
        """Whether this step renews the inverses."""
        return self._due(self.config.inverse_update_steps)

    @torch.no_grad()
    def begin_trial(self) -> Trial:
        """Remembers gradients and parameters of this step, for `end_trial`.

        Call it after the backward pass and before `precondition`.
        """
        return begin_trial(self._partition.parts)

    @torch.no_grad()
    def end_trial(self, trial: Trial, loss_before: float, loss_after: float) -> float:
        """Adapts the damping to how well the step went (see `adaptive_damping`).

        Args:
            trial: of `begin_trial`, before the parameters were changed.
            loss_before, loss_after: the mean loss of the same batch (same dropout) around the step.

        Returns:
            The reduction ratio.
        """
        parts, averages = self._partition.parts, self._state.averages
        predicted = float(predicted_change(parts, averages, trial, self._state.damping))
        ratio = (loss_after - loss_before) / predicted if predicted < 0 else float("-inf")
        steps = self.config.inverse_update_steps
        self.damping = adapted_damping(self._state.damping, ratio, steps)
        return ratio

    def _take_in_pending(self, terms: Tensor) -> bool:
        """Adds up the pending sums over ranks and moves the averages towards them.

        Returns whether they were good. `terms` becomes the sum over ranks, in place.
        """
        pending, self._pending, self._pending_terms = self._pending, {}, None
        flat = [tensor for sums in pending.values() for tensor in sums.values()]
        distributed.all_reduce_sums([terms, *flat])
        finite = torch.stack([tensor.sum(dtype=torch.float64) for tensor in flat]).isfinite().all()
        if not bool(finite & (terms > 0) & terms.isfinite()):
            self._fail("statistics", "the batch gave non-finite statistics or had no valid label")
            return False
        self._state.failures_in_a_row = 0
        # A bias-corrected moving average: the t-th update gets weight (1 - d) / (1 - d^t).
        self._state.updates += 1
        decay = self.config.factor_decay
        weight = (1 - decay) / (1 - decay**self._state.updates)
        for part in self._partition.parts:
            if part.name not in pending:
                continue
            new = average_sums(part, pending[part.name], terms)
            old = self._state.averages.get(part.name)
            if old is None or weight == 1:
                self._state.averages[part.name] = new
            else:
                for key, value in new.items():
                    old[key].lerp_(value, weight)
        return True

    def _correct_eigenvalues(self, rows: dict[str, RowPairs], terms: Tensor) -> None:
        """Moves the corrected eigenvalues towards the second moments in the present basis."""
        sums = {
            name: summed_eigenvalues(
                pairs,
                self._state.inverses[name]["A.eigenvectors"],
                self._state.inverses[name]["B.eigenvectors"],
            )
            for name, pairs in rows.items()
            if name in self._state.inverses
        }
        distributed.all_reduce_sums(list(sums.values()))
        self._state.corrections += 1
        decay = self.config.factor_decay
        weight = (1 - decay) / (1 - decay**self._state.corrections)
        for name, total in sums.items():
            average = total / terms.to(total.dtype)
            old = self._state.inverses[name].get("corrected")
            self._state.inverses[name]["corrected"] = (
                average if old is None else old.lerp_(average, weight)
            )

    def _renew_inverses(self) -> None:
        self._state.inverses_stale = False
        self._state.corrections = 0
        kind, relative = self.config.damping_kind, self.config.relative_damping
        for part in self._partition.parts:
            averages = self._state.averages.get(part.name)
            if averages is None or not self._is_preconditioned(part):
                continue
            inverse = inverses.invert(
                part,
                averages,
                kind=kind,
                damping=self._state.damping,
                relative=relative,
                uses=self.config.inverse_update_steps,
            )
            if inverse is None:
                self._fail("inverse", f"the factors of layer '{part.name}' could not be inverted")
            else:
                self._state.inverses[part.name] = inverse

    def _is_preconditioned(self, part: Any) -> bool:
        return self.config.fallback == "diagonal" or part.name not in self._partition.reasons

    def _fail(self, kind: str, message: str) -> None:
        state = self._state
        state.failures[kind] += 1
        state.failures_in_a_row += 1
        logger.warning("K-FAC step %d: %s; the previous ones stay in use", state.step, message)
        if state.failures_in_a_row >= self.config.max_failures:
            raise KFACError(
                f"{state.failures_in_a_row} K-FAC updates in a row failed, the last because "
                f"{message}. Lower the learning rate or raise the damping (now {state.damping:g})."
            )

    # ---- what it holds ----------------------------------------------------------------------

    def curvature(self) -> dict[str, Curvature]:
        """Name of a layer (or parameter outside layers) -> its current curvature."""
        return {
            part.name: as_curvature(part, self._state.averages[part.name])
            for part in self._partition.parts
            if part.name in self._state.averages
        }

    def report(self) -> list[ReportRow]:
        """What preconditions every parameter; the sharing is known after the first update."""
        return report_rows(self._partition, self.config.fallback, self._state.shared_over)

    def describe(self) -> str:
        """The report as a text table."""
        return format_report(self.report())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain Python values only."""
        return {
            **self._state.to_dict(),
            "kfac_approx": self.config.kfac_approx,
            "parts": self._part_names(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; tensors move to the device of the parameters.

        Raises:
            ValueError: the state belongs to another version, approximation or model.
        """
        restored = KFACState.from_dict(state, self._generator.device)
        if state["kfac_approx"] != self.config.kfac_approx:
            raise ValueError(
                f"K-FAC state was made with kfac_approx={state['kfac_approx']!r}, not "
                f"{self.config.kfac_approx!r}"
            )
        if restored.approx is not None:
            self._partition = self._make_partition(restored.approx)
        if restored.shared_over:
            called = {name: int(name in state["parts"]) for name in self._part_names()}
            self._partition = demote_uncalled(self._partition, called)
        names = self._part_names()
        if names != list(state["parts"]):
            differing = sorted(set(names) ^ set(state["parts"]))
            raise ValueError(f"K-FAC state belongs to another model: it differs in {differing[:5]}")
        self._state = restored
        self._generator.set_state(state["generator"].cpu())
        self._pending, self._pending_terms, self._recordings = {}, None, {}
        self._pending_rows = {}

    def _part_names(self) -> list[str]:
        return [part.name for part in self._partition.parts]


def _dtype(inverse: inverses.Inverse) -> torch.dtype:
    return next(iter(inverse.values())).dtype
