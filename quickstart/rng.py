"""Random keys with the shape AlgoPerf's PyTorch workloads and submissions expect: two integers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Key = npt.NDArray[np.int32]
_LIMIT = 2**31 - 1


def key(seed: int) -> Key:
    """The first key of a run."""
    return split([seed], 2)[0]


def split(seed: Sequence[int] | npt.NDArray[Any], num: int = 2) -> list[Key]:
    """`num` new keys that depend on `seed` alone."""
    generator = np.random.default_rng([int(part) for part in seed])
    return list(generator.integers(0, _LIMIT, size=(num, 2), dtype=np.int32))


def fold_in(seed: Sequence[int] | npt.NDArray[Any], data: int) -> list[int]:
    """A key that depends on `seed` and `data`."""
    return [*(int(part) for part in seed), data]
