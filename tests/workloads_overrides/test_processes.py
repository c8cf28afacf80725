"""As many processes as visible GPUs, or no start."""

import os

import pytest
import torch

from workloads_overrides import launch, processes
from workloads_overrides.errors import LaunchError
from workloads_overrides.processes import MASK, matching_mask, require_match

from .test_launch import GIVEN, folder  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("count", "visible", "given", "mask"),
    [
        (1, 0, None, None),
        (4, 0, None, None),  # on a CPU
        (4, 4, None, None),
        (1, 4, None, "0"),
        (2, 4, None, "0,1"),
        (2, 3, "5,3,1", "5,3"),
        (1, 2, "GPU-8932f937, GPU-1a2b3c4d", "GPU-8932f937"),
        (2, 2, "6,7", None),
    ],
)
def test_a_mask_leaves_one_gpu_for_each_process(count, visible, given, mask):
    assert matching_mask(count, visible, {} if given is None else {MASK: given}) == mask


@pytest.mark.parametrize(
    ("count", "visible", "given", "words"),
    [
        (8, 4, None, "NPROC=8, but only 4 GPUs are visible"),
        (2, 1, None, "NPROC=2, but only 1 GPU is visible"),
        (3, 2, "6,7", r"only 2 GPUs are visible \(CUDA_VISIBLE_DEVICES=6,7\)"),
    ],
)
def test_more_processes_than_gpus_are_refused(count, visible, given, words):
    with pytest.raises(LaunchError, match=words):
        matching_mask(count, visible, {} if given is None else {MASK: given})


@pytest.mark.parametrize(("count", "visible"), [(1, 4), (2, 4), (4, 2)])
def test_under_torchrun_the_numbers_have_to_agree_already(count, visible):
    with pytest.raises(LaunchError, match="they have to be as many"):
        require_match(count, visible)
    require_match(count, count)
    require_match(count, 0)


@pytest.fixture
def started(monkeypatch):
    """Programs that would have taken this process's place."""
    found = []

    def execve(path, argv, environment):
        found.append((argv[1:], environment.get(MASK)))
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(launch, "run", lambda plan: found.append("run here"))
    return found


def _start(monkeypatch, visible, **variables):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name in (MASK, "NPROC", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        return launch.main(["--", *GIVEN])
    except SystemExit:
        return None


def test_one_process_on_many_gpus_sees_one_of_them(folder, monkeypatch, started, capsys):  # noqa: F811
    _start(monkeypatch, visible=4)
    ((argv, mask),) = started
    assert (argv, mask) == (["-m", "workloads_overrides.launch", "--", *GIVEN], "0")
    assert "CUDA_VISIBLE_DEVICES=0" in capsys.readouterr().out


def test_several_processes_get_torchrun_and_as_many_gpus(folder, monkeypatch, started):  # noqa: F811
    _start(monkeypatch, visible=8, NPROC="4", **{MASK: "7,6,5,4,3,2,1,0"})
    ((argv, mask),) = started
    assert argv[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert mask == "7,6,5,4"


def test_nothing_starts_where_the_numbers_cannot_agree(folder, monkeypatch, started, capsys):  # noqa: F811
    assert _start(monkeypatch, visible=2, NPROC="4") == 2
    assert "NPROC=4, but only 2 GPUs are visible" in capsys.readouterr().err
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert _start(monkeypatch, visible=4, **ranks) == 2
    assert "have to be as many" in capsys.readouterr().err
    assert started == []


def test_processes_that_agree_train_where_they_are(folder, monkeypatch, started):  # noqa: F811
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert _start(monkeypatch, visible=2, **ranks) == 0
    assert _start(monkeypatch, visible=1) == 0
    assert _start(monkeypatch, visible=0) == 0
    assert started == ["run here"] * 3


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5", "12345"])
def test_nproc_is_a_number(text):
    with pytest.raises(LaunchError, match=f"NPROC={text} is no number of processes"):
        processes.read_nproc({"NPROC": text})
