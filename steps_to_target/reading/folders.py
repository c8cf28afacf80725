"""Find trial folders and tell from where they lie which run they hold.

Layouts (all levels above the trial may be given as the root, and the root may also lie inside):

- AlgoPerf's runner: ``<experiment_dir>/<experiment_name>/<workload>_<framework>/trial_<n>``;
- published logs and the quickstart: ``<method>/study_<n>/<workload>_<framework>/trial_<n>``.

A folder is a run when it holds AlgoPerf's files, not because of its name.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steps_to_target.errors import CompareError
from steps_to_target.model import Identity

EVALUATIONS = "eval_measurements.csv"
MEASUREMENTS = "measurements.csv"
LOG_FILES = (EVALUATIONS, MEASUREMENTS)

_TRIAL = re.compile(r"trial_(\d+)$")
_WORKLOAD = re.compile(r"(.+)_(jax|pytorch)$")
_STUDY = re.compile(r"study_(.+)$")
_TIMESTAMP = re.compile(r"-(\d{4}(?:-\d{2}){5})$")
_SIDE_FILE = re.compile(r"(hparams|meta_data_\d+|flags_\d+)\.json$")
_HEADER_BYTES = 65_536
# Folders that no run lies in: of archives, packages, network disks, and of wandb.
_SKIPPED = {
    "__MACOSX",
    "__pycache__",
    "node_modules",
    "site-packages",
    "wandb",
    "lost+found",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
}
_ARCHIVE = re.compile(r"_?archived?s?_?", re.IGNORECASE)


@dataclass
class Found:
    """Trial folders, and folders that were passed over although runs may lie in them."""

    trials: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)


def is_log(path: Path) -> bool:
    """Whether a file is one of AlgoPerf's logs: it is called so and its header has a step."""
    if path.name not in LOG_FILES or not path.is_file():
        return False
    try:
        with open(path, "rb") as stream:
            return b"global_step" in stream.read(_HEADER_BYTES)
    except OSError:
        return False


def _is_trial(folder: str, names: set[str]) -> bool:
    """Whether a folder holds AlgoPerf's files: logs, or in a folder called trial_N any of them."""
    logs = names.intersection(LOG_FILES)
    side_files = any(_SIDE_FILE.match(name) for name in names)
    if _TRIAL.match(os.path.basename(folder)):
        return bool(logs) or side_files
    return bool(logs) and (side_files or any(is_log(Path(folder, name)) for name in logs))


def _walk(root: Path, found: Found) -> None:
    """Look at and below ``root``; symbolic links are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                items = [item for item in entries if not item.name.startswith(".")]
                folders = [item for item in items if item.is_dir()]
        except OSError:
            continue
        if _is_trial(folder, {item.name for item in items}):
            found.trials.append(Path(folder))
            continue
        if not items and _TRIAL.match(os.path.basename(folder)):
            found.empty.append(Path(folder))
        for item in folders:
            if _ARCHIVE.fullmatch(item.name):
                found.archives.append(Path(item.path))
            elif item.name not in _SKIPPED:
                pending.append(item.path)


def find_trials(path: Path) -> Found:
    """All trial folders at or below ``path`` (or the one that a log file given as path lies in).

    Hidden folders and those of archives are passed over; given as ``path`` they are looked into.

    Raises:
        CompareError: there is nothing of that name, or it is a file and no log.
    """
    if not path.exists():
        raise CompareError(
            f"{path}: no such folder; give folders of runs (see --help for the layouts)"
        )
    found = Found()
    if not path.is_dir():
        if not is_log(path):
            raise CompareError(
                f"{path} is no log of a run: give a folder of runs, {EVALUATIONS}, or a .wandb "
                "file (archives have to be unpacked first)"
            )
        found.trials.append(path.resolve().parent)
        return found
    _walk(path.resolve(), found)
    for places in (found.trials, found.archives, found.empty):
        places.sort()
    return found


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and, when it could not be read, what was wrong (empty otherwise)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"{path.name} cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError):
        return {}, f"{path.name} is no valid JSON and was left out"
    if not isinstance(value, dict):
        return {}, f"{path.name} holds no JSON object and was left out"
    return value, ""


def numbered_files(folder: Path, stem: str) -> list[Path]:
    """``<stem>_0.json``, ``<stem>_1.json``, ... in the order of their numbers (one per start)."""
    pattern = re.compile(rf"{re.escape(stem)}_(\d+)\.json$")
    found = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        match = pattern.match(name)
        if match:
            found.append((int(match.group(1)), folder / name))
    return [path for _, path in sorted(found)]


def _text(mapping: Mapping[str, Any], key: str) -> str:
    value = mapping.get(key)
    return value if isinstance(value, str) else ""


def identify(folder: Path, flags: Mapping[str, Any]) -> tuple[Identity, Path]:
    """Workload, method, study and trial of a trial folder, and the folder that names the method.

    The folders' names decide; the run's flags fill in what they do not say.
    """
    trial_match = _TRIAL.match(folder.name)
    trial = trial_match.group(1) if trial_match else folder.name
    above = folder.parent
    workload_match = _WORKLOAD.match(above.name)
    if workload_match:
        workload, framework = workload_match.groups()
        above = above.parent
    else:
        workload, framework = _text(flags, "workload") or "unknown", _text(flags, "framework")
    study = ""
    study_match = _STUDY.match(above.name)
    if study_match:
        study = study_match.group(1)
        above = above.parent
    method = above.name or "runs"
    stamp = _TIMESTAMP.search(method)
    if stamp:
        # AlgoPerf's --append_timestamp: same experiment, run again. AlgoPerf's scoring puts these
        # together; without a study folder each start counts as a study of its own.
        method = method[: stamp.start()] or method
        study = f"{study}-{stamp.group(1)}" if study else stamp.group(1)
    return Identity(workload, method, study or "0", trial, framework), above


def _suffix(path: Path, depth: int) -> str:
    return "/".join(path.parts[-depth:])


def disambiguate(found: list[tuple[Identity, Path]]) -> list[Identity]:
    """Give methods that share a folder name, but not the folder, names that tell them apart.

    Folders of one name are one method while their runs do not collide (say, two studies kept in
    two places); when the same trial of the same study occurs twice, parents' names are put before.
    A method that ran one workload in both frameworks gets the framework's name appended.
    """
    by_key: dict[Identity, set[Path]] = defaultdict(set)
    folders: dict[str, set[Path]] = defaultdict(set)
    for identity, method_folder in found:
        by_key[identity].add(method_folder)
        folders[identity.method].add(method_folder)
    colliding = {identity.method for identity, places in by_key.items() if len(places) > 1}
    names: dict[Path, str] = {}
    for method in colliding:
        places = sorted(folders[method])
        depth = 2
        longest = max(len(place.parts) for place in places)
        while depth < longest and len({_suffix(p, depth) for p in places}) < len(places):
            depth += 1
        names.update({place: _suffix(place, depth) for place in places})
    renamed = [
        replace(identity, method=names[place]) if identity.method in colliding else identity
        for identity, place in found
    ]
    frameworks: dict[tuple[str, str], set[str]] = defaultdict(set)
    for identity in renamed:
        frameworks[identity.workload, identity.method].add(identity.framework)
    return [
        replace(identity, method=f"{identity.method} ({identity.framework or 'no framework'})")
        if len(frameworks[identity.workload, identity.method]) > 1
        else identity
        for identity in renamed
    ]
