"""The wheel installs the engine as kfac_algoperf, with torch as all that it needs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOP = """
import sys
import torch, torch.nn as nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
x = torch.randn(64, 8)
batches = [(x, (x[:, :3]).argmax(1))] * 40
losses = []
{loop}
    losses.append(float(loss))
assert losses[-1] < 0.6 * losses[0], losses
unwanted = [name for name in sys.modules if name.split(".")[0] in ("submission", "algoperf", "jax")]
assert not unwanted, unwanted
import kfac_algoperf
print(kfac_algoperf.__file__)
"""


def readme_loop() -> str:
    """The README's first own loop, up to its report."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"own training loop\n\n```python\n(.*?)print\(", text, re.DOTALL)
    return block


def test_every_folder_of_the_engine_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    engine = ROOT / "submission" / "kfac"
    folders = {file.parent.relative_to(engine) for file in engine.rglob("*.py")}
    names = {".".join(("kfac_algoperf", *folder.parts)) for folder in folders}
    assert set(setup["packages"]) == names


@pytest.mark.slow
def test_the_readmes_loop_runs_where_the_wheel_alone_is_installed(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "submission", source / "submission")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "."],
        cwd=source, check=True,
    )  # fmt: skip
    names = {entry.name for entry in target.iterdir() if not entry.name.endswith(".dist-info")}
    assert names == {"kfac_algoperf"}
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", LOOP.format(loop=readme_loop())],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
