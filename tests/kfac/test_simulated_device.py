"""The engine on a device that is not the CPU, in a process of its own; a GPU is not needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_device
from torch.utils import cpp_extension

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not cpp_extension.is_ninja_available(), reason="PyTorch builds it by ninja")
def test_the_engine_runs_on_a_device_that_is_not_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, HERE / "test_on_device.py"],
        env={**os.environ, "KFAC_TEST_DEVICES": simulated_device.NAME},
        cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
