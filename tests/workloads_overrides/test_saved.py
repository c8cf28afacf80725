import pytest
import torch

from workloads_overrides.errors import LaunchError
from workloads_overrides.saved import set_damaged_aside


@pytest.fixture
def trial(tmp_path):
    folder = tmp_path / "trial_1"
    folder.mkdir()
    for step in (9, 10, 100):
        torch.save(
            {"global_step": step, "model_params": torch.ones(1000)}, checkpoint(folder, step)
        )
    return folder


def checkpoint(trial, step):
    return trial / f"checkpoint_{step}"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"" if how == "empty" else b"garbage" * 100)
    path.write_bytes(content)


def names(trial):
    return sorted(path.name for path in trial.iterdir())


def test_whole_checkpoints_stay(trial):
    assert set_damaged_aside(trial.parent) == []
    assert names(trial) == ["checkpoint_10", "checkpoint_100", "checkpoint_9"]


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "garbage"])
def test_the_newest_readable_checkpoint_is_the_last_one_left(trial, how):
    damage(checkpoint(trial, 100), how)
    damage(checkpoint(trial, 10), how)
    notes = set_damaged_aside(trial.parent)
    assert len(notes) == 2
    assert "checkpoint_100 is damaged (" in notes[0]
    assert names(trial) == ["checkpoint_9", "damaged_checkpoint_10", "damaged_checkpoint_100"]
    assert set_damaged_aside(trial.parent) == []


def test_without_a_readable_one_nothing_is_touched(trial):
    before = names(trial)
    for step in (9, 10, 100):
        damage(checkpoint(trial, step), "truncated")
    with pytest.raises(LaunchError, match=r"checkpoint_100 is damaged .*none before .*--overwrite"):
        set_damaged_aside(trial.parent)
    assert names(trial) == before


def test_folders_without_checkpoints_are_new_runs(tmp_path):
    (tmp_path / "trial_1").mkdir()
    assert set_damaged_aside(tmp_path) == []
    assert set_damaged_aside(tmp_path / "nowhere") == []


def test_a_first_checkpoint_that_a_full_disk_cut_short_lets_the_trial_begin_anew(tmp_path):
    trial = tmp_path / "trial_1"
    trial.mkdir()
    checkpoint(trial, 1).write_bytes(b"PK\3\4")
    (trial / "hparams.json").write_text("")
    settings, first = set_damaged_aside(tmp_path)
    assert "hparams.json is damaged" in settings
    assert "the trial begins anew" in first
    assert names(trial) == ["damaged_checkpoint_1", "damaged_hparams.json"]
    assert set_damaged_aside(tmp_path) == []
