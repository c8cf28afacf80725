"""How statistics enter the moving averages, and corrections the inverses.

Functions on `KFACState`; `KFAC` decides when they are called, and owns the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import distributed
from .config import KFACConfig
from .curvature import average_sums
from .eigenvalue_correction import is_correctable, summed_eigenvalues
from .inverses import InverseSettings, renewed_damping
from .state import KFACState
from .statistics import KroneckerPart, Part, RowPairs, Sums


def average_in(
    state: KFACState, parts: Sequence[Part], sums: Mapping[str, Sums], terms: Tensor, decay: float
) -> bool:
    """Moves the averages towards new sums, if these are finite and there are terms.

    A part that was not reached (a layer that the pass did not call) keeps its average: zeros would
    not be its curvature. Averages are bias-corrected: the t-th update of a part has the weight
    (1 - decay) / (1 - decay^t).

    Returns:
        Whether the sums were good.
    """
    flat = [
        _where_faults_show(key, tensor).sum()
        for part in parts
        for key, tensor in sums[part.name].items()
    ]
    counts = [sums[part.name]["count"] for part in parts]
    good = torch.stack([tensor.double() for tensor in (terms, *flat)]).isfinite().all()
    good &= terms > 0
    usable, *reached = torch.stack([good.double(), *[c.double() for c in counts]]).tolist()
    if not usable:
        return False
    for part, count in zip(parts, reached, strict=True):
        if not count:
            continue
        new = average_sums(part, sums[part.name], terms)
        old = state.averages.get(part.name)
        updates = state.updates[part.name] = state.updates.get(part.name, 0) + 1
        weight = (1 - decay) / (1 - decay**updates)
        if old is None or weight == 1:
            state.averages[part.name] = new
        else:
            for key, value in new.items():
                old[key].lerp_(value, weight)
    return True


def _where_faults_show(key: str, tensor: Tensor) -> Tensor:
    """Entries of which one is not finite if any entry of the tensor is not.

    In a sum of outer products these are the squares: a fault in a row is in its own square, and no
    other product is larger (|a b| <= max(a², b²)).
    """
    dense = key in ("A", "B") and tensor.dim() == 3
    return tensor.diagonal(dim1=-2, dim2=-1) if dense else tensor


def renew_damping(state: KFACState, parts: Sequence[Part], config: KFACConfig) -> None:
    """Takes a new damping into the inverses of kind "exact", whose eigenvalues stay."""
    settings = InverseSettings(config.damping_kind, state.damping, config.relative_damping, 1)
    for part in parts:
        if part.name in state.inverses and part.name in state.averages:
            averages, inverse = state.averages[part.name], state.inverses[part.name]
            state.inverses[part.name] = renewed_damping(part, averages, inverse, settings)
    state.damping_changed = False


def correct_eigenvalues(
    state: KFACState,
    parts: Sequence[Part],
    rows: Mapping[str, RowPairs],
    terms: Tensor,
    decay: float,
) -> None:
    """Moves the corrected eigenvalues (EKFAC) towards the second moments in the present basis."""
    layers = [part for part in parts if is_correctable(part) and part.name in state.inverses]
    sums: list[Tensor] = []
    for part in layers:
        assert isinstance(part, KroneckerPart)
        inverse = state.inverses[part.name]
        basis_a, basis_b = inverse["A.eigenvectors"], inverse["B.eigenvectors"]
        if part.name in rows:
            sums.append(summed_eigenvalues(rows[part.name], basis_a, basis_b))
        else:
            sums.append(basis_a.new_zeros(len(basis_a), basis_b.shape[-1], basis_a.shape[-1]))
    reached = torch.tensor([float(part.name in rows) for part in layers], device=terms.device)
    distributed.all_reduce_sums([*sums, reached])
    state.corrections += 1
    weight = (1 - decay) / (1 - decay**state.corrections)
    for part, total, count in zip(layers, sums, reached.tolist(), strict=True):
        if not count:
            continue
        average = total / terms.to(total.dtype)
        old = state.inverses[part.name].get("corrected")
        state.inverses[part.name]["corrected"] = (
            average if old is None else old.lerp_(average, weight)
        )
