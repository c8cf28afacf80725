"""The folder that `./run.sh package` writes, alone, outside the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workloads_overrides import package as writer

ROOT = Path(__file__).parents[2]
WORKLOAD = Path(__file__).with_name("structures.py")

TRAIN = """
import importlib, json, sys
import torch

submission = importlib.import_module("external_tuning.kfac.submission")
structures = importlib.import_module("structures")
with open("external_tuning/kfac/tuning_search_space.json") as file:
    points = json.load(file)
workload, batch, losses = structures.SpeechWorkload(), structures.speech_batch(), []
for point in points:
    torch.manual_seed(0)
    model = structures.SpeechNet()
    state = submission.init_optimizer_state(workload, model, None, point, [0, 0])
    for step in range(8):
        batch = submission.data_selection(
            workload, iter([batch]), state, model, None, point, step, [0, 0]
        )
        state, model, _ = submission.update_params(
            workload=workload, current_param_container=model, current_params_types=None,
            model_state=None, hyperparameters=point, batch=batch, loss_type=workload.loss_type,
            optimizer_state=state, eval_results=[], global_step=step, rng=[step, 0], train_state={},
        )
        submission.prepare_for_eval(
            workload, model, None, None, point, workload.loss_type, state, [], step, [0, 0]
        )
    with torch.no_grad():
        loss = workload.loss_fn(batch["targets"], workload.call(model, batch))
    losses.append(float(loss["summed"]))
assert submission.get_batch_size("ogbg") > 0
files = [getattr(m, "__file__", None) or "" for m in list(sys.modules.values())]
print(json.dumps({"losses": losses, "files": files}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The packaged folder's parent."""
    folder = tmp_path_factory.mktemp("submissions")
    made = subprocess.run(
        [str(ROOT / "run.sh"), "package", str(folder)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(folder / "external_tuning" / "kfac")
    return folder


def test_it_has_what_the_submissions_repository_expects(package):
    folder = package / "external_tuning" / "kfac"
    for name in ("submission.py", "tuning_search_space.json", "README.md", "requirements.txt"):
        assert (folder / name).stat().st_size > 0
    assert "Apache License" in (folder / "LICENSE").read_text()
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") for line in lines)  # AlgoPerf's own packages are enough


@pytest.mark.parametrize("flag", [["--ruleset", "self"], ["--ruleset=self"]])
def test_the_self_tuning_ruleset_has_no_search_space(tmp_path, capsys, flag):
    assert writer.main([*flag, str(tmp_path)]) == 0
    folder = tmp_path / "self_tuning" / "kfac"
    assert capsys.readouterr().out.strip() == str(folder)
    assert (folder / "submission.py").exists()
    assert not (folder / "tuning_search_space.json").exists()
    assert not list(folder.rglob("__pycache__"))


def test_what_is_there_is_kept_and_nothing_half_written_stays(tmp_path, capsys, monkeypatch):
    folder = writer.write(tmp_path, "external")
    (folder / "notes").touch()
    assert writer.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {folder} exists: move it away first\n"
    assert (folder / "notes").exists()

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(writer.shutil, "copyfile", full)
    assert writer.main(["--ruleset", "self", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert list((tmp_path / "self_tuning").iterdir()) == []
    with pytest.raises(SystemExit):
        writer.main(["--ruleset", "own"])
    assert "invalid choice: 'own'" in capsys.readouterr().err


def test_it_trains_alone_outside_the_repository(package):
    shutil.copy(WORKLOAD, package / "structures.py")
    # The synthetic workload asks the packaged submission, not the repository's, for AlgoPerf.
    text = (package / "structures.py").read_text()
    (package / "structures.py").write_text(
        text.replace("from submission.algoperf", "from external_tuning.kfac.algoperf")
    )
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH")  # run.sh sets both
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], cwd=package, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["losses"]) == 5
    assert all(loss == loss for loss in result["losses"])
    own = [f for f in result["files"] if "external_tuning" in f]
    assert own
    assert not [f for f in result["files"] if f.startswith(str(ROOT / "submission"))]


@pytest.mark.algoperf
def test_algoperfs_checker_passes(package):
    checker = pytest.importorskip(
        "algorithms.submission_checker", reason="needs AlgoPerf's repository on PYTHONPATH"
    )
    assert checker.run_checks(str(package))
