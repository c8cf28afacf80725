"""The engine's settings: one validated dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .blocks.diagonal import NORM_ROWS
from .blocks.kronecker import BIASES
from .linalg.damping import DAMPING_KINDS
from .linalg.kfac import RAGGED_SCALINGS
from .linalg.precision import PRECISIONS
from .ranks.placement import PLACEMENTS
from .updates.directions import RULES, Rule

KFAC_APPROXES = ("expand", "reduce", "auto")
FISHER_TYPES = ("mc", "type-2", "empirical")
FALLBACKS = ("diagonal", "gradient")
RENEWALS = {
    "together": "all inverses in one step",
    "in_turns": "those of some blocks in each step, of about equal cost: no step takes much longer "
    "than others",
}
SMALLEST_DAMPING = 1e-30  # whose reciprocal is a float32


@dataclass(frozen=True)
class KFACConfig:
    """Settings of `Preconditioner`.

    Args:
        kfac_approx: "expand" (eq. 7), "reduce" (eq. 10, and eq. 55 for ragged rows), or "auto":
            the one whose setting the first outputs show, see `fisher.setting`.
        fisher_type: "mc" (labels sampled from the model), "type-2" (exact GGN) or "empirical".
        mc_samples: label samples per factor update, for "mc".
        damping: added to the curvature as `damping_kind` says; at least SMALLEST_DAMPING.
        damping_kind: see `linalg.damping.DAMPING_KINDS`.
        relative_damping: multiply damping by the mean eigenvalue of the layer's A ⊗ B.
        eigenvalue_correction: replace the eigenvalues of A ⊗ B by second moments in its
            eigenbasis (EKFAC); needs damping_kind "exact". Keeps all rows of a factor update in
            memory until the end of the step.
        direction: what `.grad` is replaced by, see `updates.directions.RULES`: "preconditioned",
            the inverse of the damped curvature times the gradient; "eigenbasis_adam" or
            "eigenbasis_polar", a finished update, to be multiplied by a learning rate. They need
            damping_kind "exact", whose eigenvectors are their basis; the damping has no part in it.
        betas, epsilon: of "eigenbasis_adam" and "eigenbasis_polar", see `linalg.eigenbasis`.
        factor_decay: weight of the old factors in the moving average; 0 keeps none.
        factor_update_steps: steps between updates of the factors.
        inverse_update_steps: steps between updates of the inverses; a multiple of the former.
        renewal: when in an interval inverses are renewed, see RENEWALS.
        early_updates: within the first interval also update at steps 1, 2, 4, 8, ...
        bias: how the bias of a linear map is preconditioned, see `blocks.kronecker.BIASES`;
            "output" needs a damping_kind that damps the factors.
        norm_rows: what counts as one gradient of a scale or shift, see `blocks.diagonal.NORM_ROWS`.
        ragged_scaling: see `linalg.kfac.RAGGED_SCALINGS`.
        factor_precision: see `linalg.precision.PRECISIONS`.
        max_factor_side: larger sides keep only the diagonal of their factor; other
            parameters with more entries than the square of it keep a mean for each row.
        exclude: names of modules whose parameters (and those inside them) get no factors.
        fallback: what trains parameters without factors: "diagonal" (their own curvature: unit-wise
            for scales and shifts, diagonal for others) or "gradient" (as it is).
        inverse_placement: with several ranks, see `ranks.placement.PLACEMENTS`.
        max_failures: so many updates in a row may fail (non-finite or empty batches,
            factorisations that do not succeed) before training ends with an error.
        seed: of the label sampling.
    """

    kfac_approx: str = "expand"
    fisher_type: str = "mc"
    mc_samples: int = 1
    damping: float = 1e-3
    damping_kind: str = "pi"
    relative_damping: bool = False
    eigenvalue_correction: bool = False
    direction: str = "preconditioned"
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    factor_decay: float = 0.0
    factor_update_steps: int = 10
    inverse_update_steps: int = 10
    renewal: str = "together"
    early_updates: bool = True
    bias: str = "joint"
    norm_rows: str = "examples"
    ragged_scaling: str = "sqrt"
    factor_precision: str = "float32"
    max_factor_side: int = 8192
    exclude: tuple[str, ...] = ()
    fallback: str = "diagonal"
    inverse_placement: str = "exchanged"
    max_failures: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("kfac_approx", self.kfac_approx, KFAC_APPROXES)
        _check_choice("fisher_type", self.fisher_type, FISHER_TYPES)
        _check_choice("damping_kind", self.damping_kind, tuple(DAMPING_KINDS))
        _check_choice("ragged_scaling", self.ragged_scaling, tuple(RAGGED_SCALINGS))
        _check_choice("factor_precision", self.factor_precision, tuple(PRECISIONS))
        _check_choice("renewal", self.renewal, tuple(RENEWALS))
        _check_choice("bias", self.bias, tuple(BIASES))
        _check_choice("norm_rows", self.norm_rows, tuple(NORM_ROWS))
        if self.bias == "output" and self.damping_kind == "exact":
            raise ValueError(
                "bias 'output' needs the inverse of B by itself: damping_kind must not be 'exact'"
            )
        _check_choice("fallback", self.fallback, FALLBACKS)
        _check_choice("direction", self.direction, tuple(RULES))
        self._check_rule()
        _check_choice("inverse_placement", self.inverse_placement, tuple(PLACEMENTS))
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude must be a tuple of names, not the string {self.exclude!r}")
        if self.eigenvalue_correction and self.inverse_placement == "one_rank":
            raise ValueError(
                "eigenvalue_correction needs the eigenvectors on every rank: inverse_placement "
                "must be 'every_rank' or 'exchanged'"
            )
        for name in ("mc_samples", "factor_update_steps", "inverse_update_steps", "max_failures"):
            _check_positive_integer(name, getattr(self, name))
        _check_positive_integer("max_factor_side", self.max_factor_side)
        if self.mc_samples > 1 and self.fisher_type != "mc":
            raise ValueError(
                f"mc_samples ({self.mc_samples}) counts sampled labels: fisher_type must be 'mc', "
                f"not {self.fisher_type!r}"
            )
        check_damping(self.damping)
        if not 0 <= self.factor_decay < 1:
            raise ValueError(f"factor_decay must be in [0, 1), not {self.factor_decay}")
        if self.eigenvalue_correction and self.damping_kind != "exact":
            raise ValueError(
                f"eigenvalue_correction needs damping_kind 'exact', not {self.damping_kind!r}: "
                "only there the eigenvalues are at hand"
            )
        if self.eigenvalue_correction and self.renewal == "in_turns":
            raise ValueError(
                "eigenvalue_correction needs renewal 'together': all corrections begin anew at once"
            )
        if self.inverse_update_steps % self.factor_update_steps:
            raise ValueError(
                f"inverse_update_steps ({self.inverse_update_steps}) must be a multiple of "
                f"factor_update_steps ({self.factor_update_steps}): in between there is nothing "
                "new to invert"
            )

    @property
    def rule(self) -> type[Rule]:
        """What `direction` names."""
        return RULES[self.direction]

    def _check_rule(self) -> None:
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), not {self.betas}")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be positive and finite, not {self.epsilon}")
        for name, allowed in self.rule.needs.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"direction {self.direction!r} needs {name}="
                    f"{' or '.join(repr(one) for one in allowed)}, not {value!r}"
                )


def check_damping(value: float) -> None:
    """Raises a ValueError for a damping that float32 cannot divide by."""
    if not (math.isfinite(value) and value >= SMALLEST_DAMPING):
        raise ValueError(
            f"damping must be positive and finite, at least {SMALLEST_DAMPING:g}, not {value}"
        )


def is_due(step: int, interval: int, *, early: bool) -> bool:
    """Whether what happens every `interval` steps happens in a step.

    Curvature changes fastest at the start (a zero-initialised head gives the layers below it no
    curvature at all in step 0); `early` adds steps 1, 2, 4, 8, ... of the first interval.
    """
    return step % interval == 0 or (early and step < interval and step & (step - 1) == 0)


def as_config(config: object) -> KFACConfig:
    """The settings; those of None are the defaults.

    Raises:
        TypeError: they are no KFACConfig.
    """
    if config is None:
        return KFACConfig()
    if not isinstance(config, KFACConfig):
        raise TypeError(f"config must be a KFACConfig(...), not {type(config).__name__}")
    return config


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_positive_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
