"""Every tunable of the submission: one typed, validated dataclass.

A tuning point (an entry of AlgoPerf's search space, or any mapping) is read by
`Hyperparameters.from_tuning_point`. Whatever is wrong with it is reported before training starts,
with the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from .kfac import KFACConfig
from .kfac.blocks.diagonal import NORM_ROWS
from .kfac.blocks.kronecker import BIASES
from .kfac.config import FALLBACKS, FISHER_TYPES, KFAC_APPROXES, RENEWALS, SMALLEST_DAMPING
from .kfac.linalg.damping import DAMPING_KINDS
from .kfac.linalg.kfac import RAGGED_SCALINGS
from .kfac.linalg.precision import PRECISIONS
from .kfac.optimizer import DEFAULTS
from .kfac.updates.directions import RULES
from .optimizers import UPDATE_RULES
from .schedules import SCHEDULES, ScheduleShape, schedule_shape


def _self_tuned() -> dict[str, Any]:
    engine = dict(DEFAULTS)
    beta1, beta2 = engine.pop("betas")
    return {
        "update_rule": engine.pop("direction"),
        **engine,
        "renewal": "together",  # as it was studied; in turns steps are of equal length
        "beta1": beta1,
        "beta2": beta2,
        "learning_rate": 0.015,
        "schedule": "warmup_linear",
        "warmup_fraction": 0.05,
        "step_hint_factor": 0.75,
        "runtime_share": 0.95,
    }


# The point that runs under the self-tuning ruleset, the same for all workloads: the engine's
# defaults, which are the best single setting of the study of optimizers (docs/optimizers.md).
SELF_TUNED: Mapping[str, Any] = types.MappingProxyType(_self_tuned())


class HyperparameterError(ValueError):
    """A tuning point that cannot be used: what, where, what is allowed."""


def _tunable(
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    metadata = {
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
    }
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Hyperparameters:
    """The submission's tunables. Fields without a default must be in every tuning point.

    Args:
        kfac_approx: "expand", "reduce", "auto" (see `kfac.KFACConfig`), or "none": the update rule
            on the plain gradient, which is the reference of a comparison.
        update_rule: what consumes the preconditioned gradient: "nesterov" or "nadamw"; or
            "eigenbasis_adam", Adam in the eigenbasis of the factors, or its polar factor,
            "eigenbasis_polar".
        learning_rate: peak of the schedule.
        beta1: momentum (Nesterov), or decay of the first moment (NAdamW).
        beta2, epsilon: of NAdamW.
        weight_decay: added to the (preconditioned) gradient by Nesterov, decoupled in NAdamW.
        schedule: "warmup_linear" (to end_factor times the peak) or "warmup_cosine" (to 0).
        training_steps: length of the schedule; None takes step_hint_factor times the workload's
            step hint.
        step_hint_factor: AlgoPerf's target-setting runs use 0.75.
        warmup_steps: absolute; None takes warmup_fraction of the schedule's length.
        warmup_fraction: share of the schedule's length.
        schedule_factor: shortens the warm-up and the whole schedule alike (the paper's K-FAC runs
            use 0.75 of the reference's).
        decay_steps_factor: the linear decay ends after this share of the steps behind the warm-up.
        end_factor: last learning rate of the linear decay, as a share of the peak.
        runtime_share: a schedule that would take more than this share of the allowed run time, at
            the speed of the run's first steps, is cut to the steps that fit, see `pace`; None for
            a schedule in steps alone.
        grad_clip: largest norm of the gradient before preconditioning; None for no clipping.
        average_share: evaluations take an average over this share of the steps so far, the last
            ones, see `averaging`; None for the parameters in training.
        label_smoothing: passed to the workload's loss.
        adaptive_damping: the Levenberg-Marquardt rule of `kfac.adaptive_damping`, each time the
            inverses are renewed; costs one more forward pass there.
        dropout_rate: passed to the workload's model where it takes one; None for its own.

    The others are those of `kfac.KFACConfig`, where they are described.
    """

    kfac_approx: str = _tunable(choices=(*KFAC_APPROXES, "none"))
    update_rule: str = _tunable(choices=tuple(UPDATE_RULES))
    learning_rate: float = _tunable(above=0, at_most=3e38)  # a float32

    beta1: float = _tunable(0.9, at_least=0, below=1)
    beta2: float = _tunable(0.999, at_least=0, below=1)
    epsilon: float = _tunable(1e-8, above=0)
    weight_decay: float = _tunable(0.0, at_least=0)

    schedule: str = _tunable("warmup_cosine", choices=tuple(SCHEDULES))
    training_steps: int | None = _tunable(None, at_least=1)
    step_hint_factor: float = _tunable(1.0, above=0, at_most=1e3)
    warmup_steps: int | None = _tunable(None, at_least=0)
    warmup_fraction: float = _tunable(0.05, at_least=0, below=1)
    schedule_factor: float = _tunable(1.0, above=0, at_most=1e3)
    decay_steps_factor: float = _tunable(1.0, above=0, at_most=1)
    end_factor: float = _tunable(0.0, at_least=0, at_most=1)
    runtime_share: float | None = _tunable(None, above=0, at_most=1)

    grad_clip: float | None = _tunable(None, above=0)
    average_share: float | None = _tunable(None, above=0, at_most=1)
    label_smoothing: float = _tunable(0.0, at_least=0, below=1)
    dropout_rate: float | None = _tunable(None, at_least=0, below=1)

    fisher_type: str = _tunable("mc", choices=FISHER_TYPES)
    mc_samples: int = _tunable(1, at_least=1, at_most=1000)
    damping: float = _tunable(1e-3, at_least=SMALLEST_DAMPING)
    damping_kind: str = _tunable("pi", choices=tuple(DAMPING_KINDS))
    relative_damping: bool = _tunable(False)
    eigenvalue_correction: bool = _tunable(False)
    adaptive_damping: bool = _tunable(False)
    factor_decay: float = _tunable(0.0, at_least=0, below=1)
    factor_update_steps: int = _tunable(10, at_least=1)
    inverse_update_steps: int = _tunable(10, at_least=1)
    renewal: str = _tunable("together", choices=tuple(RENEWALS))
    early_updates: bool = _tunable(True)
    bias: str = _tunable("joint", choices=tuple(BIASES))
    norm_rows: str = _tunable("examples", choices=tuple(NORM_ROWS))
    ragged_scaling: str = _tunable("sqrt", choices=tuple(RAGGED_SCALINGS))
    factor_precision: str = _tunable("float32", choices=tuple(PRECISIONS))
    max_factor_side: int = _tunable(8192, at_least=1)
    fallback: str = _tunable("diagonal", choices=FALLBACKS)
    max_failures: int = _tunable(100, at_least=1)

    @classmethod
    def self_tuned(cls) -> Hyperparameters:
        """The settings under the self-tuning ruleset: SELF_TUNED."""
        return cls.from_tuning_point(SELF_TUNED)

    @classmethod
    def from_tuning_point(cls, point: Any) -> Hyperparameters:
        """Reads AlgoPerf's hyperparameters (a namedtuple) or a mapping.

        Raises:
            HyperparameterError: unknown or missing name, wrong type, value out of range.
        """
        given = _as_mapping(point)
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise HyperparameterError(
                f"unknown hyperparameter '{unknown[0]}'; known are: {', '.join(known)}"
            )
        for name, f in known.items():
            if name not in given and f.default is MISSING:
                raise HyperparameterError(
                    f"hyperparameter '{name}' is missing; it must be {_allowed(f, cls)}"
                )
        hints = typing.get_type_hints(cls)
        values = {name: _read(known[name], hints[name], value) for name, value in given.items()}
        hyperparameters = cls(**values)
        hyperparameters._check_together()
        return hyperparameters

    def _check_together(self) -> None:
        if self.inverse_update_steps % self.factor_update_steps:
            raise HyperparameterError(
                f"hyperparameter 'inverse_update_steps' is {self.inverse_update_steps}; it must "
                f"be a multiple of 'factor_update_steps' ({self.factor_update_steps})"
            )
        if self._is_in_the_eigenbasis:
            self._check_eigenbasis()
        if self.eigenvalue_correction and self.damping_kind != "exact":
            raise HyperparameterError(
                f"hyperparameter 'damping_kind' is {self.damping_kind!r}; it must be 'exact' with "
                "'eigenvalue_correction'"
            )
        if self.eigenvalue_correction and self.renewal != "together":
            raise HyperparameterError(
                f"hyperparameter 'renewal' is {self.renewal!r}; it must be 'together' with "
                "'eigenvalue_correction'"
            )
        if (
            self.warmup_steps is not None
            and self.training_steps is not None
            and self.warmup_steps >= self.training_steps
        ):
            raise HyperparameterError(
                f"hyperparameter 'warmup_steps' is {self.warmup_steps}; it must be below "
                f"'training_steps' ({self.training_steps})"
            )

    def _check_eigenbasis(self) -> None:
        wrong = {
            "kfac_approx": self.kfac_approx == "none",
            "eigenvalue_correction": self.eigenvalue_correction,
            "adaptive_damping": self.adaptive_damping,
        }
        for name, given in wrong.items():
            if given:
                raise HyperparameterError(
                    f"hyperparameter '{name}' is {getattr(self, name)!r}; update_rule "
                    f"{self.update_rule!r} works in the eigenbasis of K-FAC's factors, without "
                    "damping"
                )

    def schedule_shape(self, step_hint: int, at_most: int | None = None) -> ScheduleShape:
        """The shape of the schedule.

        Args:
            step_hint: the workload's, in steps.
            at_most: see `schedules.schedule_shape`.

        Raises:
            ValueError: the warm-up is not shorter than the schedule.
        """
        return schedule_shape(
            step_hint=step_hint,
            training_steps=self.training_steps,
            step_hint_factor=self.step_hint_factor,
            warmup_steps=self.warmup_steps,
            warmup_fraction=self.warmup_fraction,
            schedule_factor=self.schedule_factor,
            decay_steps_factor=self.decay_steps_factor,
            end_factor=self.end_factor,
            at_most=at_most,
        )

    @property
    def _is_in_the_eigenbasis(self) -> bool:
        return self.update_rule in RULES and RULES[self.update_rule].is_finished

    def kfac_config(self, seed: int) -> KFACConfig | None:
        """The engine's settings, or None for kfac_approx="none"."""
        if self.kfac_approx == "none":
            return None
        shared = {f.name for f in fields(KFACConfig)} & {f.name for f in fields(self)}
        settings = {name: getattr(self, name) for name in sorted(shared)}
        if self._is_in_the_eigenbasis:
            settings |= {"direction": self.update_rule, "damping_kind": "exact"}
            settings |= {"betas": (self.beta1, self.beta2)}
        return KFACConfig(seed=seed, **settings)


def _as_mapping(point: Any) -> Mapping[str, Any]:
    if isinstance(point, Mapping):
        return point
    if hasattr(point, "_asdict"):
        mapping: Mapping[str, Any] = point._asdict()
        return mapping
    raise HyperparameterError(
        "the hyperparameters must be a mapping or AlgoPerf's namedtuple, not "
        f"{type(point).__name__}; pass --tuning_search_space"
    )


def _read(f: Field[Any], hint: Any, value: Any) -> Any:
    """The value in the field's type, checked against its range."""
    kinds = set(typing.get_args(hint)) or {hint}
    if value is None and types.NoneType in kinds:
        return None
    converted = _convert(kinds - {types.NoneType}, value)
    if converted is None or not _in_range(f, converted):
        raise HyperparameterError(
            f"hyperparameter '{f.name}' is {reprlib.repr(value)}; it must be "
            f"{_allowed(f, Hyperparameters)}"
        )
    return converted


def _convert(kinds: set[Any], value: Any) -> Any:
    """The value as one of the kinds, or None where it is none of them."""
    if bool in kinds:
        return value if isinstance(value, bool) else None
    if str in kinds:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        if not math.isfinite(value):
            return None
    except OverflowError:  # an integer of hundreds of digits
        return None
    if int in kinds:  # search spaces sample floats: 10.0 is meant as 10
        return int(value) if float(value).is_integer() else None
    return float(value)


def _in_range(f: Field[Any], value: Any) -> bool:
    limits = f.metadata
    if limits["choices"] is not None:
        return value in limits["choices"]
    return not (
        (limits["at_least"] is not None and value < limits["at_least"])
        or (limits["above"] is not None and value <= limits["above"])
        or (limits["at_most"] is not None and value > limits["at_most"])
        or (limits["below"] is not None and value >= limits["below"])
    )


def _allowed(f: Field[Any], cls: type) -> str:
    """What a field may be, in words."""
    hint = typing.get_type_hints(cls)[f.name]
    kinds = set(typing.get_args(hint)) or {hint}
    if f.metadata["choices"] is not None:
        words = "one of " + ", ".join(repr(choice) for choice in f.metadata["choices"])
    elif bool in kinds:
        words = "true or false"
    else:
        words = "an integer" if int in kinds else "a finite number"
        names = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}
        limits = [
            f"{sign} {f.metadata[key]:g}"
            for key, sign in names.items()
            if f.metadata[key] is not None
        ]
        words = " ".join([words, " and ".join(limits)]).strip()
    return words + (" or null" if types.NoneType in kinds else "")
