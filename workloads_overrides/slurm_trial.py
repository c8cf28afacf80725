"""One trial inside a cluster's job: a command in processes of its own.

The command has to go on from its last checkpoint by itself. So a job that Slurm interrupts (a
preemption, the end of its time) only has to end the command's processes and to be queued again.
"""

import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

GRACE_SECONDS = 60.0  # less than the time between Slurm's warning and its kill
# Slurm kills a job that it asked to end, or queues it again, at most this long afterwards.
LONGEST_GRACE_SECONDS = 1800.0


class TrialError(Exception):
    """A trial ended with an error of its own; queueing it again would not help."""


@dataclass
class Trial:
    """A trial that submitit pickles, calls in the job, and asks for its successor.

    Attributes:
        name: For people.
        command: Program and arguments; interrupted and started again, it goes on.
        processes: Passed to the command as NPROC.
        folder: Working directory.
    """

    name: str
    command: tuple[str, ...]
    processes: int
    folder: str
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _asked_to_end: bool = field(default=False, init=False, repr=False)

    def __call__(self) -> str:
        """Runs the command to its end and returns the trial's name.

        The environment (WANDB_* and all else) is the job's; nothing of it is in the pickle.

        Raises:
            TrialError: It ended with an error.
        """
        print(f"trial {self.name}: {self.describe()}", flush=True)
        signal.signal(signal.SIGTERM, self._note_request)
        self._process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env={**os.environ, "NPROC": str(self.processes)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = self._process.wait()
        finally:
            self._end_processes()
        if code and self._asked_to_end and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            # Slurm asked all processes to end, the command's too. A job that now ended by itself,
            # before Slurm ends it, would count as failed and not be queued again.
            print("asked to end: waiting for Slurm to queue or to kill this job", flush=True)
            time.sleep(LONGEST_GRACE_SECONDS)
        if code:
            raise TrialError(f"trial {self.name} ended with exit code {code}: see its output above")
        return self.name

    def checkpoint(self) -> Any:
        """What submitit queues when Slurm interrupts this job: the same trial."""
        from submitit.helpers import DelayedSubmission

        self._end_processes()
        return DelayedSubmission(Trial(self.name, self.command, self.processes, self.folder))

    def describe(self) -> str:
        """The command as it would be typed into a shell."""
        return f"NPROC={self.processes} {shlex.join(self.command)}"

    def _note_request(self, signum: int, frame: Any) -> None:
        self._asked_to_end = True

    def _end_processes(self) -> None:
        """Ends the command and all that it started: they hold GPUs and the run's folder."""
        process, self._process = self._process, None
        if process is None or not _signal_group(process.pid, signal.SIGTERM):
            return
        deadline = time.monotonic() + GRACE_SECONDS
        while _is_running(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        _signal_group(process.pid, signal.SIGKILL)


def _signal_group(leader: int, signum: int) -> bool:
    """Signals a process group; False where none of it is left."""
    try:
        os.killpg(leader, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _is_running(child: int) -> bool:
    """Whether a child still runs; it is not reaped.

    A signal handler may call this inside `Popen.wait`, whose lock it must not need.
    """
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
