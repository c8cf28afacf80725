"""Checkpoints that are whole or absent, load without running code, and keep one predecessor."""

import io
import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quickstart.errors import QuickstartError, writing

KEEP = 2
_NAME = re.compile(r"checkpoint_(\d+)")


@dataclass
class Restored:
    """What a checkpoint gives back besides the model, the optimizer and the generators."""

    train_state: dict[str, Any]
    eval_results: list[tuple[int, dict[str, float]]]
    global_step: int
    preemption_count: int
    queue_position: int
    logs: dict[str, str]


def list_checkpoints(folder: Path) -> list[Path]:
    """A trial's checkpoints, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint_*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def save(
    folder: Path, model: nn.Module, optimizer_state: dict[str, Any], progress: Restored
) -> None:
    """Writes `checkpoint_<step>` and deletes all but the newest two.

    Raises:
        QuickstartError: if it cannot be written.
    """
    content = {
        "model_params": model.state_dict(),
        "optimizer_state": {
            key: value.state_dict()
            for key, value in optimizer_state.items()
            if hasattr(value, "state_dict")
        },
        "generators": _generator_states(),
        **progress.__dict__,
    }
    # Through memory: torch reports a full disk as an internal error, an ordinary write says so.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with writing(folder / f"checkpoint_{progress.global_step}") as temporary:
        temporary.write_bytes(buffer.getbuffer())
    for old in list_checkpoints(folder)[KEEP:]:
        old.unlink()


def restore(
    folder: Path, model: nn.Module, optimizer_state: dict[str, Any]
) -> tuple[Restored | None, list[str]]:
    """Restores from the newest readable checkpoint of a trial.

    Returns:
        What it holds (None if the trial has no checkpoint at all), and one line for each newer
        checkpoint that could not be read.

    Raises:
        QuickstartError: if there are checkpoints and none is readable, or if the newest readable
            one belongs to another model or optimizer.
    """
    problems: list[str] = []
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            content = _read(path)
        except Exception as error:  # torch.load raises many types on a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problems.append(f"{path} is damaged ({reason})")
            continue
        _apply(path, content, model, optimizer_state)
        return Restored(**{name: content[name] for name in Restored.__annotations__}), problems
    if paths:
        raise QuickstartError(
            f"{'; '.join(problems)}: no checkpoint is left to resume from, start again with "
            "--overwrite"
        )
    return None, problems


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load itself does not compare checksums
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} differs")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    missing = [
        name
        for name in ("model_params", "optimizer_state", "generators", *Restored.__annotations__)
        if name not in content
    ]
    if missing:
        raise ValueError(f"it lacks {missing[0]}")
    return content


def _apply(
    path: Path, content: dict[str, Any], model: nn.Module, optimizer_state: dict[str, Any]
) -> None:
    saved = content["optimizer_state"]
    try:
        model.load_state_dict(content["model_params"])
        for key, value in optimizer_state.items():
            if key not in saved:
                raise KeyError(f"it has no optimizer state {key!r}")
            value.load_state_dict(saved[key])
        _set_generator_states(content["generators"])
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise QuickstartError(
            f"{path} was made with another model or submission ({reason}): use the same settings "
            "as the run had, or start again with --overwrite"
        ) from error


def _generator_states() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = state
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
