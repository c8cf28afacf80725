"""What matters: one setting of ours changed at a time, from the point that tuning has chosen.

Two methods are taken apart: Adam in the eigenbasis, which is in the submission's search space, for
what factors are made of; NAdamW on the preconditioned gradient for what matters only where a
curvature is inverted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from experiments.optimizers.methods import METHODS, Method, Point, build_submission

NAME = "ablation"
# (what is changed, [(value shown, changed settings), ...]); the base's own value is left out.
Setting = tuple[str, tuple[tuple[str, dict[str, Any]], ...]]

_MOVING_AVERAGE: Setting = ("moving average", tuple(
    (f"{decay:g}", {"factor_decay": decay}) for decay in (0.0, 0.5, 0.9, 0.97)
))  # fmt: skip
_FACTORS: tuple[Setting, ...] = (
    ("approximation", (
        ("expand", {"kfac_approx": "expand"}), ("reduce", {"kfac_approx": "reduce"}),
    )),
    ("Fisher", (
        ("Monte Carlo", {"fisher_type": "mc"}),
        ("Monte Carlo, 4 samples", {"fisher_type": "mc", "mc_samples": 4}),
        ("empirical", {"fisher_type": "empirical"}),
        ("type-2 (exact)", {"fisher_type": "type-2"}),
    )),
    ("factors and inverses every", tuple(
        (f"{k} and {m} steps", {"factor_update_steps": k, "inverse_update_steps": m})
        for k, m in ((1, 1), (1, 10), (10, 10), (10, 50), (50, 50))
    )),
    ("inverses renewed", (
        ("together", {"renewal": "together"}), ("in turns", {"renewal": "in_turns"}),
    )),
    _MOVING_AVERAGE,
    ("ragged scaling", (
        ("inputs and gradients by √R", {"ragged_scaling": "sqrt"}),
        ("inputs by R", {"ragged_scaling": "mean_sum"}),
        ("gradients by R", {"ragged_scaling": "sum_mean"}),
    )),
    ("bias", (("joint", {"bias": "joint"}), ("apart", {"bias": "separate"}))),
)  # fmt: skip
_INVERSES: tuple[Setting, ...] = (
    _MOVING_AVERAGE,
    ("damping", tuple((f"{d:g}", {"damping": d}) for d in (1e-5, 1e-4, 1e-3, 1e-2))),
    ("damping kind", (
        ("both factors", {"damping_kind": "both_factors"}),
        ("π-split", {"damping_kind": "pi"}),
        ("exact", {"damping_kind": "exact"}),
        ("π-split, relative to the layer", {"damping_kind": "pi", "relative_damping": True}),
    )),
    ("norm parameters", (
        ("curvature of their own", {"fallback": "diagonal"}),
        ("plain gradient", {"fallback": "gradient"}),
    )),
    ("eigenvalues", (
        ("corrected (EKFAC)", {"eigenvalue_correction": True, "damping_kind": "exact"}),
    )),
    ("base rule", (
        ("NAdamW", {"update_rule": "nadamw"}), ("Nesterov", {"update_rule": "nesterov"}),
    )),
)  # fmt: skip

CHANGES = {"kfac_reduce_eigenbasis": _FACTORS, "kfac_reduce_nadamw": _INVERSES}  # by base
METHOD = Method(
    NAME, "ablation", "submission", METHODS["kfac_reduce_nadamw"].points, build_submission
)  # its points are those of `changes`


@dataclass(frozen=True)
class Change:
    """The base with one setting changed; `what` is empty for the base itself."""

    what: str
    value: str
    point: Point


def base_points(chosen: Callable[[Method], Point | None]) -> dict[str, Point]:
    """The chosen points of the methods that the ablation starts from; of those that are tuned."""
    found = ((name, chosen(METHODS[name])) for name in CHANGES)
    return {name: point for name, point in found if point is not None}


def changes(name: str, base: Point) -> Iterator[Change]:
    """The base (a point of the method `name`), then every change that is one."""
    yield Change("", "base", base)
    full = {**DEFAULTS, **base}
    for what, values in CHANGES[name]:
        for shown, changed in values:
            if any(full.get(key) != value for key, value in changed.items()):
                yield Change(what, shown, {**base, **changed})


def base_values(name: str, base: Point) -> dict[str, str]:
    """What the base itself has, by what is changed."""
    full = {**DEFAULTS, **base}
    return {
        what: shown
        for what, values in CHANGES[name]
        for shown, changed in values
        if all(full.get(key) == value for key, value in changed.items())
    }


def _defaults() -> dict[str, Any]:
    from dataclasses import MISSING, fields

    from submission.hyperparameters import Hyperparameters

    return {f.name: f.default for f in fields(Hyperparameters) if f.default is not MISSING}


DEFAULTS = _defaults()
