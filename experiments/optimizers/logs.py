"""Logs of runs: one JSON file each, written whole when the run has ended.

Several processes, also on several machines with a common file system that knows locks, may work on
one folder: a run is claimed by a lock that goes with its process.
"""

from __future__ import annotations

import datetime
import fcntl
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import results
from experiments.optimizers.methods import Point, point_key
from experiments.optimizers.training import Evaluation, Outcome
from quickstart.errors import QuickstartError, explain_os_error, writing


@dataclass(frozen=True)
class Run:
    """What decides how a run goes.

    Attributes:
        task: name of the task.
        setting: all else about the task: data, sizes, length.
        method, point, seed: as in `methods` and `study`.
    """

    task: str
    setting: Mapping[str, Any]
    method: str
    point: Point
    seed: int

    @property
    def digest(self) -> str:
        """Names the task's setting and the point."""
        content = point_key({"setting": self.setting, "point": self.point})
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def path(self, folder: Path) -> Path:
        """Where its log lies below the folder of all logs."""
        return folder / self.task / self.method / f"{self.digest}_seed{self.seed}.json"


@dataclass(frozen=True)
class Log:
    """A run that has ended."""

    run: Run
    metric: str
    higher_is_better: bool
    outcome: Outcome
    context: Mapping[str, Any]

    @property
    def best(self) -> float | None:
        """The best metric of the run; None if it has no finite one."""
        values = [e.metric for e in self.outcome.evaluations if e.metric is not None]
        if not values:
            return None
        return max(values) if self.higher_is_better else min(values)

    @property
    def score(self) -> float:
        """The best metric such that larger is better; minus infinity without one."""
        if self.best is None:
            return float("-inf")
        return self.best if self.higher_is_better else -self.best

    def first_at(self, target: float) -> Evaluation | None:
        """The first evaluation that is as good as the target."""
        sign = 1 if self.higher_is_better else -1
        return next(
            (
                e
                for e in self.outcome.evaluations
                if e.metric is not None and sign * e.metric >= sign * target
            ),
            None,
        )


def code_version() -> str:
    """Names the submission's source, which decides how K-FAC's runs go."""
    digest = hashlib.sha256()
    for path in sorted((results.ROOT / "submission").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write(folder: Path, log: Log) -> Path:
    """Writes a log, whole or not at all.

    Raises:
        QuickstartError: the folder cannot be written.
    """
    run = log.run
    content = {
        "task": run.task,
        "setting": dict(run.setting),
        "method": run.method,
        "point": dict(run.point),
        "seed": run.seed,
        "metric": log.metric,
        "higher_is_better": log.higher_is_better,
        "outcome": log.outcome.to_json(),
        "context": dict(log.context),
    }
    path = run.path(folder)
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def context() -> dict[str, Any]:
    """Date, machine and versions, for a log."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": results.machine(),
        "versions": {**results.versions(), **_package_version(), "submission": code_version()},
    }


def read(path: Path) -> Log:
    """A log.

    Raises:
        QuickstartError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        outcome = content["outcome"]
        return Log(
            Run(
                content["task"], content["setting"], content["method"], content["point"],
                content["seed"],
            ),
            content["metric"],
            content["higher_is_better"],
            Outcome(
                tuple(Evaluation(**e) for e in outcome["evaluations"]),
                outcome["seconds"],
                outcome["problem"],
            ),
            content["context"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuickstartError(
            f"{path} is damaged ({error}): delete it and run the study again"
        ) from error


def read_all(folder: Path) -> list[Log]:
    """All logs below a folder, in the order of their paths."""
    return [read(path) for path in sorted(folder.glob("*/*/*_seed*.json"))]


def pack(folder: Path, archive: Path) -> int:
    """Writes all logs below a folder, and the timings, into one file; returns their number.

    The same logs give the same file, byte for byte.

    Raises:
        QuickstartError: the file cannot be written.
    """
    paths = [*sorted(folder.glob("*/*/*_seed*.json")), *sorted(folder.glob("*/timing.json"))]
    lines = [
        json.dumps({path.relative_to(folder).as_posix(): json.loads(path.read_text("utf-8"))})
        for path in paths
    ]
    packed = gzip.compress("\n".join(lines).encode(), mtime=0)
    with writing(archive) as temporary:
        temporary.write_bytes(packed)
    return len(lines)


def unpack(archive: Path, folder: Path) -> int:
    """Puts the logs of an archive into a folder, where they are missing; returns how many.

    Raises:
        QuickstartError: the archive is damaged, or the folder cannot be written.
    """
    try:
        lines = gzip.decompress(archive.read_bytes()).decode().splitlines()
        found = dict(pair for line in lines for pair in json.loads(line).items())
    except (OSError, EOFError, ValueError) as error:
        raise QuickstartError(f"{archive} cannot be read ({error})") from error
    written = 0
    for name, content in found.items():
        path = folder / name
        inside = path.resolve().is_relative_to(folder.resolve())
        if inside and not path.exists():
            with writing(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            written += 1
    return written


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the run of this log is to be done here: nobody has done it, nobody is at it.

    Raises:
        QuickstartError: the folder cannot be written.
    """
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise explain_os_error(error, lock) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            # Another process may have finished it between the look and the lock.
            yield not path.exists()
        finally:
            lock.unlink(missing_ok=True)


def _package_version() -> dict[str, str]:
    import importlib.metadata

    try:
        return {"pytorch_optimizer": importlib.metadata.version("pytorch_optimizer")}
    except importlib.metadata.PackageNotFoundError:
        return {}
