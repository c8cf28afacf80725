"""AlgoPerf's own test of submissions, with fake batches, on every PyTorch workload, on a CPU.

Needs an interpreter with AlgoPerf and its repository (`./run.sh setup --algoperf` brings both; or
`ALGOPERF_CLONE` names the folder). A workload whose packages are missing is skipped. Everything
together takes most of an hour on one core; criteo1tb itself needs 30 GB, its small variant is run.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from submission.hyperparameters import SELF_TUNED
from workloads_overrides.step_costs import WORKLOADS

pytestmark = [pytest.mark.algoperf, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
VARIANTS = [
    "fastmri_layernorm", "imagenet_vit_glu", "imagenet_vit_map",
    "librispeech_deepspeech_norm_and_spec_aug", "ogbg_model_size", "wmt_post_ln",
]  # fmt: skip
STEPS = 3
MISSING = ("ModuleNotFoundError", "ImportError")


@pytest.fixture(scope="module")
def algoperf():
    """(interpreter, folder of AlgoPerf's repository)."""
    environment = Path(os.environ.get("ALGOPERF_VENV_DIR", ROOT / ".venv-algoperf"))
    clone = Path(os.environ.get("ALGOPERF_CLONE", ROOT / ".cache" / "algoperf"))
    if not (clone / "tests" / "reference_algorithm_tests.py").exists():
        pytest.skip("AlgoPerf's repository is not here; `./run.sh setup --algoperf` brings it")
    for candidate in (sys.executable, str(environment / "bin" / "python")):
        if Path(candidate).exists():
            found = subprocess.run(
                [candidate, "-c", "import algoperf"], capture_output=True, check=False
            )
            if found.returncode == 0:
                return candidate, clone
    pytest.skip("AlgoPerf is not importable here; `./run.sh setup --algoperf` installs it")


def run_workload(algoperf, folder, workload, method):
    """`method`: "expand", "reduce", or "self" for what runs under the self-tuning ruleset."""
    python, clone = algoperf
    point = json.loads((ROOT / "tuning_search_space.json").read_text())[0]
    point = dict(SELF_TUNED) if method == "self" else point | {"kfac_approx": method}
    # Three steps are fewer than a warm-up, and dropout hides what they gain.
    point |= {"learning_rate": 3e-4, "warmup_fraction": 0.0, "dropout_rate": 0.0}
    (folder / "point.json").write_text(json.dumps([point]))
    out = folder / "result.json"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            python, "-m", "workloads_overrides.fake_queue", f"--clone={clone}", f"--out={out}",
            f"--workload={workload}", "--submission_path=submission/submission.py",
            f"--tuning_search_space={folder / 'point.json'}", "--global_batch_size=4",
            f"--num_train_steps={STEPS}", "--short_decoding",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1:] or [""]
    if not out.exists() and last[0].startswith(MISSING):
        pytest.skip(f"{workload} needs a package: {last[0]}")
    assert out.exists(), done.stderr[-2000:]
    result = json.loads(out.read_text())
    if result["error"] and result["error"].startswith(MISSING):
        pytest.skip(f"{workload} needs a package: {result['error']}")
    return result


@pytest.mark.parametrize("method", ["expand", "reduce", "self"])
@pytest.mark.parametrize("workload", [*WORKLOADS, *VARIANTS])
def test_algoperfs_own_test_passes_and_the_loss_falls(algoperf, tmp_path, workload, method):
    result = run_workload(algoperf, tmp_path, workload, method)
    assert result["passed"], result["error"]
    assert len(result["losses"]) == STEPS
    assert all(map(math.isfinite, result["losses"]))
    assert min(result["losses"][1:]) < result["losses"][0]
