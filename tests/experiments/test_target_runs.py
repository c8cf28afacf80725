import argparse
import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments import cifar, every_step, image_tuning, imagenet_vit, ogbg, target_runs
from experiments.paper.figures import FIGURES
from quickstart import settings
from quickstart.errors import QuickstartError
from quickstart.parallel import Outcome
from submission.hyperparameters import Hyperparameters


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    target_runs.add_flags(parser)
    return parser.parse_args(list(flags))


@pytest.mark.slow
def test_every_step_on_the_digits(tmp_path: Path) -> None:
    result = every_step.run(
        options("--seeds", "0", "--steps=30", "--jobs=2"), tmp_path, Console(quiet=True)
    )
    assert result["data"] == "scikit-learn's digits"
    assert tuple(result["methods"]) == every_step.METHODS
    for method in result["methods"].values():
        assert method["curves"][0]["steps"][-1] == 30
    (table,) = every_step.tables(result)
    assert table.rows[0][0] == "nadamw (reference)"
    assert target_runs.draw(result, tmp_path / "picture.png")


def test_settings_are_every_step_with_an_average_and_clipping() -> None:
    files = sorted(image_tuning.SETTINGS.glob("*every_step.json"))
    assert len(files) == 2
    for path in files:
        (point,) = json.loads(path.read_text())
        settings = Hyperparameters.from_tuning_point(point)
        assert settings.kfac_approx in path.name
        assert (settings.factor_update_steps, settings.inverse_update_steps) == (1, 10)
        assert settings.factor_decay > 0
        assert settings.grad_clip is not None


def test_points_get_the_length_and_nothing_else_changes(tmp_path: Path) -> None:
    contest = target_runs.of_study("images", ("nadamw", "kfac_reduce_nadamw"))
    shorter = target_runs.with_length(contest, 20, tmp_path)
    assert shorter.steps == 20
    for method, path in shorter.points.items():
        (new,) = json.loads(path.read_text())
        (old,) = json.loads(contest.points[method].read_text())
        assert new == {**old, "training_steps": 20}
    with pytest.raises(QuickstartError, match="--steps must be 1 or more"):
        target_runs.with_length(contest, 0, tmp_path)


def test_the_molecules_methods_are_in_the_quickstarts_study() -> None:
    contest = target_runs.of_study("molecules", ogbg.METHODS)
    assert contest.reference == "nesterov"
    assert all(path.is_file() for path in contest.points.values())
    assert set(contest.points) <= set(settings.read_study("molecules").methods)


def test_a_failed_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_fail(jobs: list[object], **_: object) -> list[Outcome]:
        return [Outcome(job, 1, "error: diverged", 1.0) for job in jobs]

    monkeypatch.setattr(target_runs, "run_jobs", all_fail)
    with pytest.raises(QuickstartError, match="3 runs failed, first nadamw/study_4: error: div"):
        imagenet_vit.run(options("--seeds", "4"), tmp_path, Console(quiet=True))


def test_table_of_runs_that_did_not_all_reach() -> None:
    method = {"runs": 2, "reached": 2, "steps": [100.0, 5.0], "seconds": [3.0, 0.25],
              "ratio_steps": None, "ratio_seconds": None, "curves": []}  # fmt: skip
    other = {**method, "reached": 0, "steps": None, "seconds": None}
    third = {**method, "ratio_steps": [0.5, 0.4, 0.625], "ratio_seconds": [0.75, None, None]}
    result = {"data": "d", "metric": "accuracy", "target": 0.95, "reference": "a",
              "methods": {"a": method, "b": other, "c": third}}  # fmt: skip
    (table,) = target_runs.tables(result, FIGURES["imagenet_vit"])
    assert table.rows[:3] == (
        ("a (reference)", "2/2", "100 ± 5", "1", "3.0 ± 0.2", "1"),
        ("b", "0/2", "-", "-", "-", "-"),
        ("c", "2/2", "100 ± 5", "0.50 [0.40, 0.62]", "3.0 ± 0.2", "0.75"),
    )
    assert table.rows[3:] == (
        ("the paper's reference (NAdamW)", "3/3", "122,139 ± 1,119", "1", "26.10 ± 0.24 h", "1"),
        ("the paper's K-FAC-expand", "3/3", "87,464 ± 245", "72 %", "19.57 ± 0.13 h", "75 %"),
        ("the paper's K-FAC-reduce", "3/3", "92,550 ± 731", "76 %", "20.28 ± 0.00 h", "78 %"),
    )


def test_packed_jpegs_are_called_recompressed(tmp_path: Path) -> None:
    (tmp_path / "cifar10_jpeg_train.npz").touch()
    assert cifar.name_of(tmp_path) == "JPEG-recompressed CIFAR-10"
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    assert cifar.name_of(tmp_path) == "CIFAR-10"


def test_tuning_tried_as_much_for_every_method_and_took_the_best() -> None:
    record = json.loads(image_tuning.RECORD.read_text())
    assert record["target"] == image_tuning.below(
        min(record["reference_with_other_seeds"].values())
    )
    for method in image_tuning.METHODS:
        tried = [entry for entry in record["tried"] if entry["method"] == method]
        assert [entry["learning_rate"] for entry in tried] == list(image_tuning.LEARNING_RATES)
        best = max(tried, key=lambda entry: entry["best_accuracy"])
        (point,) = json.loads(image_tuning.point_file(method).read_text())
        assert point == {**image_tuning.base_point(method), "learning_rate": best["learning_rate"]}


@pytest.mark.parametrize(("value", "target"), [(0.9056, 0.90), (0.91, 0.90), (0.95, 0.94)])
def test_target_lies_below_what_was_reached(value: float, target: float) -> None:
    assert image_tuning.below(value) == target
