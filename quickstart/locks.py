"""One writer a trial folder: a lock that every process of this project respects.

Needs nothing but filelock, which comes with torch: the launcher of AlgoPerf uses it too. The lock
is the operating system's and ends with the process that holds it, however that ends.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"


class RunInUseError(Exception):
    """Another process is training in a folder; the message says which and what to do."""


@contextlib.contextmanager
def hold(trial: Path) -> Iterator[None]:
    """Keeps other processes out of a trial's folder, which is made if it is not there.

    A folder that holds nothing but the lock when the block ends is removed again, and so are those
    around it that are empty: a run that was refused leaves nothing behind.

    Raises:
        RunInUseError: another process holds it.
    """
    made = [folder for folder in (trial, *trial.parents) if not folder.exists()]
    trial.mkdir(parents=True, exist_ok=True)
    lock = _acquire(trial)
    try:
        yield
    finally:
        if [path.name for path in trial.iterdir()] == [NAME]:
            (trial / NAME).unlink()
        lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def delete(folder: Path) -> None:
    """Deletes a folder with the trials in it, unless a process is training in one of them.

    Raises:
        RunInUseError: one is; nothing is deleted.
    """
    with contextlib.ExitStack() as locks:
        for trial in sorted(folder.glob("trial_*")):
            if re.fullmatch(r"trial_\d+", trial.name) and trial.is_dir():
                locks.callback(_acquire(trial).release)
        shutil.rmtree(folder)


def _acquire(trial: Path) -> FileLock:
    lock = FileLock(trial / NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunInUseError(
            f"another process is training in {trial}: wait for it, or choose another "
            "--experiment_name"
        ) from error
    return lock
