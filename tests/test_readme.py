"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
    return {
        "model": model,
        "batches": batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "F": F,
        "x": batches[0][0],
    }


def test_the_training_loop(names, capsys):
    (loop,) = [block for block in BLOCKS if "kfac.precondition()" in block]
    added = [line for line in loop.splitlines() if "kfac" in line.lower() and "print" not in line]
    assert len(added) == 5
    before = names["model"][0].weight.detach().clone()
    exec(loop, names)
    assert not torch.equal(names["model"][0].weight, before)
    assert "K-FAC-reduce" in capsys.readouterr().out


def test_factors_without_an_optimizer(names):
    (block,) = [block for block in BLOCKS if "kronecker_factors(" in block]
    exec(block, names)
    assert names["factors"]["0"].input_covariance.shape == (5, 5)
    assert names["factors"]["0"].gradient_covariance.shape == (8, 8)


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parents[1] / target).exists(), target
