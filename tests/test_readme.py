"""What the README shows runs as it stands there."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def names(monkeypatch):
    # As installed, see tests/kfac/test_installed.py.
    monkeypatch.setitem(sys.modules, "kfac_algoperf", importlib.import_module("submission.kfac"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
    return {
        "model": model,
        "batches": batches,
        "torch": torch,
        "x": batches[0][0],
    }


def test_the_training_loop(names, capsys):
    (loop,) = [block for block in BLOCKS if "optimizer.record()" in block]
    changed = [line for line in loop.splitlines() if re.search(r"# \d", line)]
    assert len(changed) == 3
    before = names["model"][0].weight.detach().clone()
    exec(loop, names)
    assert not torch.equal(names["model"][0].weight, before)
    assert "K-FAC-reduce" in capsys.readouterr().out


def test_the_papers_method_in_front_of_another_rule(names):
    (loop,) = [block for block in BLOCKS if "optimizer.record()" in block]
    (other,) = [block for block in BLOCKS if "base=lambda" in block]
    imported = "\n".join(line for line in loop.splitlines() if line.startswith(("import", "from")))
    body = loop[loop.index("for x, y") :]
    before = names["model"][0].weight.detach().clone()
    exec(f"{imported}\n{other}\n{body}", names)
    assert not torch.equal(names["model"][0].weight, before)


def test_factors_without_an_optimizer(names):
    (block,) = [block for block in BLOCKS if "kronecker_factors(" in block]
    exec(block, names)
    assert names["factors"]["0"].input_covariance.shape == (5, 5)
    assert names["factors"]["0"].gradient_covariance.shape == (8, 8)


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parents[1] / target).exists(), target
