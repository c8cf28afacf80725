"""Errors that a user can act on, shown as one line and without a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class QuickstartError(Exception):
    """Something the user can put right; the message says what, where and how."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` that replaces it once the block has ended well.

    Whatever goes wrong inside the block, `path` keeps its old content and no temporary file stays.

    Raises:
        QuickstartError: if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def explain_os_error(error: OSError, path: Path) -> QuickstartError:
    """Turns an operating system error on `path` into one line that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "the disk is full: free some space and run the same command again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "no permission to write there: choose a folder you own"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        advice = "a file is where a folder is needed, or the other way round: move it away"
    else:
        advice = str(error)
    return QuickstartError(f"cannot write {path}: {advice}")


def run_reporting_errors(main: Callable[[], int]) -> None:
    """Calls `main` and leaves the process with its exit code, or with one line and code 1.

    Ctrl-C that `main` does not handle itself gives one line and code 130.
    """
    try:
        code = main()
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {explain_os_error(error, Path(error.filename or '.'))}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
