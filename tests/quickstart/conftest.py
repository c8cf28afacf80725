from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quickstart import molecules
from quickstart.graphs import PackedGraphs

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SUBMISSION = HERE / "sgd_submission.py"


def make_smiles(count: int) -> list[str]:
    """Chains and rings of different sizes."""
    ends = ["O", "N", "Cl", "C(=O)O", "c1ccccc1", "C#N", "F", "C1CC1"]
    return ["C" * (1 + i // len(ends)) + ends[i % len(ends)] for i in range(count)]


@pytest.fixture(scope="session")
def graphs() -> PackedGraphs:
    smiles = make_smiles(160)
    labels = np.random.default_rng(0).integers(-1, 2, size=(len(smiles), 3)).astype(np.int8)
    packed, rejected = molecules.featurize(smiles, labels, processes=0)
    assert not rejected
    return packed


@pytest.fixture(scope="session")
def data_dir(graphs: PackedGraphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    molecules.save(folder, graphs)
    return folder


@pytest.fixture
def flags_for(data_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a run of a few seconds; keyword arguments replace or add, None leaves out."""
    point = tmp_path / "point.json"
    point.write_text('[{"learning_rate": 0.1, "dropout_rate": 0.1}]')

    def build(*more: str, **changes: object) -> list[str]:
        flags: dict[str, object] = {
            "workload": "molecules",
            "submission_path": SUBMISSION,
            "tuning_search_space": point,
            "experiment_dir": tmp_path / "runs",
            "experiment_name": "sgd/study_0",
            "data_dir": data_dir,
            "max_global_steps": 9,
            "eval_every": 3,
            "batch_size": 16,
            "rng_seed": 0,
            "validation_target_value": 2.0,
            "test_target_value": 2.0,
            **changes,
        }
        return [f"--{k}={v}" for k, v in flags.items() if v is not None] + list(more)

    return build


@pytest.fixture
def runner_process() -> Callable[[list[str]], subprocess.Popen[str]]:
    def start(flags: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "quickstart.runner", *flags],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
