from __future__ import annotations

import errno
from pathlib import Path

import pandas as pd
import pytest
import torch

from quickstart import checkpoints
from quickstart.errors import QuickstartError, writing
from quickstart.run_logs import MetricsLogger, open_workload_folder


def test_logs_are_the_union_of_all_columns(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.append_scalar_metrics({"loss": 0.5}, 1)
    logger.append_scalar_metrics({"loss": 0.25}, 2)
    metrics = {"validation/accuracy": 0.125, "a": 1}
    logger.append_scalar_metrics(metrics, 2, preemption_count=0, is_eval=True)
    assert metrics["global_step"] == 2
    table = pd.read_csv(tmp_path / "measurements.csv")
    assert table["loss"].tolist()[:2] == [0.5, 0.25]
    assert table["validation/accuracy"].isna().tolist() == [True, True, False]
    evaluations = pd.read_csv(tmp_path / "eval_measurements.csv")
    assert list(evaluations) == ["a", "global_step", "preemption_count", "validation/accuracy"]
    assert evaluations["validation/accuracy"].tolist() == [0.125]


def test_logs_go_back_to_a_checkpoint(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.append_scalar_metrics({"loss": 0.5}, 1, is_eval=True)
    saved = logger.contents()
    logger.append_scalar_metrics({"loss": 0.4, "extra": 3}, 2, is_eval=True)
    (tmp_path / "measurements.csv").open("a").write("half a li")
    again = MetricsLogger(tmp_path)
    again.restore(saved)
    again.append_scalar_metrics({"loss": 0.3}, 2)
    assert (tmp_path / "measurements.csv").read_text() == "global_step,loss\n1,0.5\n2,0.3\n"
    assert (tmp_path / "eval_measurements.csv").read_text() == "global_step,loss\n1,0.5\n"
    again.restore({})
    assert not list(tmp_path.iterdir())


def test_folders_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    folder = tmp_path / "sgd" / "molecules_pytorch"
    open_workload_folder(folder, resume=False, overwrite=False)
    (folder / "trial_1").mkdir(parents=True)
    with pytest.raises(QuickstartError, match=r"--resume_last_run .* --overwrite"):
        open_workload_folder(folder, resume=False, overwrite=False)
    open_workload_folder(folder, resume=True, overwrite=False)
    assert (folder / "trial_1").exists()
    (folder / "thesis.tex").touch()
    with pytest.raises(QuickstartError, match=r"holds \['thesis.tex'\]"):
        open_workload_folder(folder, resume=False, overwrite=True)
    (folder / "thesis.tex").unlink()
    open_workload_folder(folder, resume=False, overwrite=True)
    assert not folder.exists()
    (tmp_path / "file").touch()
    with pytest.raises(QuickstartError, match="a file is where a folder is needed"):
        open_workload_folder(tmp_path / "file", resume=False, overwrite=False)


def test_writing_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half(error: BaseException) -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(QuickstartError, match="the disk is full"):
        write_half(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        write_half(KeyboardInterrupt())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def save(folder: Path, step: int, value: float) -> None:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=value, momentum=0.9)
    progress = checkpoints.Restored({}, [(step, {"a": 1.0})], step, 0, step, {"log": "text"})
    checkpoints.save(folder, model, {"optimizer": optimizer}, progress)


def restore(folder: Path) -> tuple[float, int | None, list[str]]:
    model = torch.nn.Linear(1, 1)
    state = {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)}
    restored, problems = checkpoints.restore(folder, model, state)
    step = None if restored is None else restored.global_step
    return model.weight.item(), step, problems


def test_the_newest_two_checkpoints_stay(tmp_path: Path) -> None:
    assert restore(tmp_path)[1] is None
    for step in (8, 9, 10, 11):
        save(tmp_path, step, step / 100)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint_11",
        "checkpoint_10",
    ]
    assert restore(tmp_path) == (pytest.approx(0.11), 11, [])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "empty", "pickle"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 3, 0.03)
    save(tmp_path, 6, 0.06)
    newest = tmp_path / "checkpoint_6"
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        # In the middle of the file lies the state of torch's generator.
        content[len(content) // 2] ^= 0xFF
    elif damage == "pickle":
        torch.save({"model_params": Path("x")}, newest)
        content = bytearray(newest.read_bytes())
    else:
        content = bytearray(b"" if damage == "empty" else b"garbage")
    newest.write_bytes(content)
    value, step, problems = restore(tmp_path)
    assert (value, step) == (pytest.approx(0.03), 3)
    assert len(problems) == 1
    assert "checkpoint_6 is damaged" in problems[0]
    (tmp_path / "checkpoint_3").write_bytes(b"garbage")
    with pytest.raises(QuickstartError, match=r"no checkpoint is left .* --overwrite"):
        restore(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    save(tmp_path, 3, 0.03)
    model = torch.nn.Linear(2, 1)
    state = {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    with pytest.raises(QuickstartError, match=r"another model or submission .*size mismatch"):
        checkpoints.restore(tmp_path, model, state)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(QuickstartError, match="no optimizer state 'other'"):
        checkpoints.restore(tmp_path, model, {"other": state["optimizer"]})


def test_all_generators_are_restored(tmp_path: Path) -> None:
    import random

    import numpy as np

    save(tmp_path, 3, 0.03)
    expected = (torch.rand(3).tolist(), np.random.rand(), random.random())
    restore(tmp_path)
    restore(tmp_path)
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == expected
