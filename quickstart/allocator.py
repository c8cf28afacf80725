"""Memory of training on a CPU: kept for the next step, as the allocator of a GPU keeps it."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library hand out freed memory again in place of returning it to the system.

    glibc maps every large tensor anew, and the system clears each of its pages at the first touch:
    a fifth of a backward pass of a Wide ResNet, more in steps that allocate more. The process then
    stays as large as it has ever been.

    Returns:
        Whether this C library can.
    """
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # no C library that is found this way
        return False
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
