"""Checkpoints of AlgoPerf that a kill cut short: set aside, so that the one before is used.

AlgoPerf writes a checkpoint in place and resumes from the one with the largest step, whole or not.
"""

import re
import zipfile
from pathlib import Path

from workloads_overrides.errors import LaunchError

_NAME = re.compile(r"checkpoint_(\d+)")


def set_damaged_aside(trials: Path) -> list[str]:
    """Renames damaged newest checkpoints of all trials to `damaged_checkpoint_*`.

    Only the newest readable one and those after it are looked at.

    Args:
        trials: The folder that holds `trial_*`.

    Returns:
        One line for each, for people.

    Raises:
        LaunchError: A trial has checkpoints, and none is readable.
    """
    notes = []
    for trial in sorted(trials.glob("trial_*")):
        found = [
            (int(m[1]), p) for p in trial.glob("checkpoint_*") if (m := _NAME.fullmatch(p.name))
        ]
        paths = [path for _, path in sorted(found, reverse=True)]
        damaged: list[tuple[Path, str]] = []
        for path in paths:
            problem = _problem(path)
            if problem is None:
                break
            damaged.append((path, problem))
        if paths and len(damaged) == len(paths):
            raise LaunchError(
                f"{damaged[0][0]} is damaged ({damaged[0][1]}) and there is none before it: give "
                "--overwrite to begin anew, or another --experiment_name"
            )
        for path, problem in damaged:
            path.rename(path.with_name(f"damaged_{path.name}"))
            notes.append(
                f"{path} is damaged ({problem}): renamed to damaged_{path.name}, the one before it "
                "is used"
            )
    return notes


def _problem(path: Path) -> str | None:
    """What is wrong with a file of torch.save, None if nothing is; it is not unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
            names = archive.namelist()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        return str(error) or type(error).__name__
    if part is not None:
        return f"the checksum of {part} differs"
    return None if any(n.endswith("data.pkl") for n in names) else "it is no file of torch.save"
