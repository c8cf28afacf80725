"""As many processes as there are GPUs to see: AlgoPerf splits every batch by the number of GPUs.

With more GPUs than processes some shares of a batch are trained or evaluated by nobody: ogbg then
crashes at its first evaluation, and ViT ends with a part of its validation loss and exit code 0.
"""

import os
from collections.abc import Mapping

from workloads_overrides.errors import LaunchError

MASK = "CUDA_VISIBLE_DEVICES"


def matching_mask(processes: int, visible: int, environment: Mapping[str, str]) -> str | None:
    """CUDA_VISIBLE_DEVICES under which every process has a GPU and no GPU is left over.

    Args:
        processes: their number.
        visible: number of GPUs that would be seen.
        environment: of the process; a mask in it is narrowed, never widened.

    Returns:
        The first GPUs of those that are visible, None where nothing has to change: the numbers
        agree, or there is no GPU at all.

    Raises:
        LaunchError: there are more processes than GPUs.
    """
    if visible in (0, processes):
        return None
    if processes > visible:
        mask = f" ({MASK}={environment[MASK]})" if environment.get(MASK) else ""
        raise LaunchError(
            f"NPROC={processes}, but only {visible} GPU{'s are' if visible > 1 else ' is'} visible"
            f"{mask}: AlgoPerf needs one for each process"
        )
    masked = [name.strip() for name in environment.get(MASK, "").split(",") if name.strip()]
    return ",".join((masked or [str(index) for index in range(visible)])[:processes])


def require_match(local_processes: int, visible: int) -> None:
    """Refuses to go on in a process of torchrun that sees more or fewer GPUs than processes.

    Raises:
        LaunchError: the numbers differ.
    """
    if visible not in (0, local_processes):
        raise LaunchError(
            f"{local_processes} process{'es' if local_processes > 1 else ''} and {visible} visible "
            f"GPUs: they have to be as many. Start through ./run.sh algoperf with "
            f"NPROC={local_processes}, or set {MASK}"
        )


def read_nproc(environment: Mapping[str, str]) -> int:
    """The number of processes that the user asks for with NPROC (default 1).

    Raises:
        LaunchError: it is no number from 1 to 9999.
    """
    text = environment.get("NPROC") or "1"
    if not text.isdecimal() or len(text) > 4 or int(text) < 1:
        raise LaunchError(f"NPROC={text[:20]} is no number of processes: give 1 to 9999")
    return int(text)


def under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in environment and "RANK" in environment
