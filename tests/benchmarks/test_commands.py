"""Every benchmark runs at its tiny size and writes its figures; how fast, nobody asserts."""

import json

import pytest

from benchmarks.__main__ import main

COMMANDS = {
    "step": ["--methods", "ours", "--fisher", "mc", "--models", "wrn", "gpt"],
    "sweep": ["--models", "vit", "--batch-sizes", "2", "4", "--approx", "reduce"],
    "amortised": ["--batch-sizes", "4"],
    "profile": ["--models", "wrn", "graph", "--approx", "expand", "--operators", "3"],
    "memory": ["--models", "vit", "--methods", "ours", "--approx", "expand"],
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_it_runs_at_its_tiny_size(command, tmp_path, capsys):
    repeats = [] if command == "memory" else ["--repeats", "1"]
    options = ["--size", "tiny", "--threads", "1", "--output", str(tmp_path), *repeats]
    assert main([command, *COMMANDS[command], *options]) == 0
    saved = json.loads((tmp_path / f"{command}.json").read_text())
    assert saved["results"]
    assert saved["environment"]
    assert (tmp_path / f"{command}.png").stat().st_size > 1000
    assert "figures:" in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_one_line(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["step", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
