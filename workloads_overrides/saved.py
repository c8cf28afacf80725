"""Files of AlgoPerf that a kill or a full disk cut short: set aside, so that the run goes on.

AlgoPerf writes in place, and resumes from the checkpoint with the largest step, whole or not.
"""

import json
import re
import zipfile
from pathlib import Path

from workloads_overrides.errors import LaunchError

_NAME = re.compile(r"checkpoint_(\d+)")


def set_damaged_aside(trials: Path) -> list[str]:
    """Renames damaged newest checkpoints of all trials to `damaged_checkpoint_*`.

    Only the newest readable one and those after it are looked at. Where the first checkpoint of all
    is damaged, the trial begins anew; a damaged `hparams.json` is set aside and written again.

    Args:
        trials: The folder that holds `trial_*`.

    Returns:
        One line for each, for people.

    Raises:
        LaunchError: A trial has several checkpoints, and none is readable.
    """
    notes = []
    for trial in sorted(trials.glob("trial_*")):
        notes += _set_settings_aside(trial / "hparams.json")
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
        if len(paths) > 1 and len(damaged) == len(paths):
            raise LaunchError(
                f"{damaged[0][0]} is damaged ({damaged[0][1]}) and there is none before it: give "
                "--overwrite to begin anew, or another --experiment_name"
            )
        for path, problem in damaged:
            path.rename(path.with_name(f"damaged_{path.name}"))
            then = "the one before it is used" if len(paths) > 1 else "the trial begins anew"
            notes.append(f"{path} is damaged ({problem}): renamed to damaged_{path.name}, {then}")
    return notes


def _set_settings_aside(path: Path) -> list[str]:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        path.rename(path.with_name(f"damaged_{path.name}"))
        return [f"{path} is damaged: renamed to damaged_{path.name} and written again"]
    return []


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
