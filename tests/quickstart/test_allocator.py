"""Memory that is freed is used again, without the system's help."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from quickstart.allocator import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        for megabytes in (40, 100, 3):
            torch.zeros(megabytes, 1 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages(), keep_freed_memory(), pages(), pages())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc")
def test_large_tensors_meet_no_fresh_pages_once_memory_is_kept():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    before, kept, _, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library cannot")
    assert int(before) > 1000  # 4 KiB each, or larger ones
    assert int(after) < int(before) / 10
