"""Copies of one log, kept aside or pushed to wandb, count once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps_to_target.model import Note, Run

_USUAL = (re.compile(r"trial_\d+"), re.compile(r".+_(jax|pytorch)"), re.compile(r"study_[^ ]+"))


def _content(run: Run) -> tuple[object, ...]:
    """What two copies share to the last bit; no two runs take the same time to the last bit."""
    arrays = (run.steps, run.seconds, run.values, run.test_values)
    target = run.target.key if run.target else None
    return (run.workload, target, *(array.tobytes() for array in arrays))


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two JSON files may be one: equal, or one of them is not there."""
    if not one or not other:
        return True
    texts = [json.dumps(item, sort_keys=True, default=str) for item in (one, other)]
    return texts[0] == texts[1]


def _is_copy(run: Run, original: Run) -> bool:
    seeds = [item.flags.get("rng_seed", item.meta.get("rng_seed")) for item in (run, original)]
    return _agree(run.hparams, original.hparams) and (None in seeds or seeds[0] == seeds[1])


def _order(run: Run) -> tuple[Any, ...]:
    """Of two copies the one that lies where AlgoPerf puts it is the original."""
    path = Path(run.path)
    names = (path.name, path.parent.name, path.parent.parent.name)
    strange = [not form.fullmatch(name) for form, name in zip(_USUAL, names, strict=True)]
    return (run.path.startswith("wandb:"), strange, len(path.parts), len(run.path), run.path)


def without_copies(runs: Sequence[Run]) -> list[Run]:
    """Leave out runs whose log is a copy of another's; the other one gets a note that names them.

    Two runs are one where workload, target and every evaluation are equal (steps, seconds and
    metrics, bit by bit) and hyperparameters and seeds do not contradict each other. Runs without an
    evaluation are never taken for copies.
    """
    originals: dict[tuple[object, ...], list[Run]] = {}
    copies: dict[str, list[str]] = {}
    for run in sorted(runs, key=_order):
        kept = originals.setdefault(_content(run), [])
        original = next((other for other in kept if len(run.steps) and _is_copy(run, other)), None)
        if original is None:
            kept.append(run)
        else:
            copies.setdefault(original.path, []).append(run.path)
    remaining = {run.path for kept in originals.values() for run in kept}
    return [
        replace(run, notes=(*run.notes, *_notes(copies.get(run.path, []))))
        for run in runs
        if run.path in remaining
    ]


def _notes(paths: list[str]) -> list[Note]:
    kind = "copies of a log were left out, each log counts once"
    return [Note(kind, f"copy in {path}") for path in paths]
