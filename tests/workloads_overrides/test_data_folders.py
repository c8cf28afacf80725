import pytest

from workloads_overrides import data_folders
from workloads_overrides.errors import LaunchError
from workloads_overrides.runner_flags import RunnerFlags


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def molecules(tmp_path):
    folder = tmp_path / "data" / "ogbg"
    names = ["dataset_info.json", "features.json"]
    names += [f"ogbg_molpcba-train.tfrecord-0000{i}-of-00002" for i in range(2)]
    names += [f"ogbg_molpcba-{s}.tfrecord-00000-of-00001" for s in ("validation", "test")]
    for name in names:
        touch(folder / "ogbg_molpcba" / "0.1.3" / name)
    return folder


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "data" / "imagenet" / "pytorch"
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            touch(folder / split / name / "1.JPEG")
    touch(folder / "imagenet_v2" / "matched-frequency" / "3.0.0" / "dataset_info.json")
    return folder


def test_nothing_is_missing(molecules, photographs):
    assert data_folders.first_missing("ogbg", molecules) is None
    assert data_folders.first_missing("imagenet_vit", photographs) is None
    assert data_folders.first_missing("wmt", photographs / "nowhere") is None


@pytest.mark.parametrize(
    "name",
    [
        "dataset_info.json",
        "features.json",
        "ogbg_molpcba-validation.tfrecord-00000-of-00001",
        "ogbg_molpcba-train.tfrecord-00001-of-00002",
    ],
)
def test_a_missing_file_of_molecules_is_named(molecules, name):
    (molecules / "ogbg_molpcba" / "0.1.3" / name).unlink()
    missing = data_folders.first_missing("ogbg", molecules)
    assert name.partition("tfrecord")[0] in missing


def test_the_folder_above_is_recognised(molecules, photographs):
    assert f"--data_dir={molecules}" in data_folders.first_missing("ogbg", molecules.parent)
    above = data_folders.first_missing("imagenet_vit", photographs.parent)
    assert f"--data_dir={photographs}" in above


def test_missing_images_are_named(photographs):
    (photographs / "val" / "n01440764" / "1.JPEG").unlink()
    (photographs / "val" / "n01440764").rmdir()
    missing = data_folders.first_missing("imagenet_vit", photographs)
    assert "train/ has 2 classes, val/ has 1" in missing
    (photographs / "val" / "n01443537" / "1.JPEG").unlink()
    (photographs / "val" / "n01443537").rmdir()
    assert "was unpacked, not sorted" in data_folders.first_missing("imagenet_vit", photographs)


def test_the_test_split_may_lie_elsewhere(photographs, tmp_path):
    (photographs / "imagenet_v2").rename(tmp_path / "imagenet_v2")
    assert "ImageNet v2" in data_folders.first_missing("imagenet_vit", photographs)
    assert data_folders.first_missing("imagenet_vit", photographs, tmp_path) is None


@pytest.mark.parametrize(
    ("workload", "folder", "given", "words"),
    [
        ("ogbg", "data/ogbg", "data", ["--ogbg", "830 MB"]),
        ("imagenet_vit", "data/imagenet/pytorch", "data", ["--framework=pytorch", "150 GB"]),
    ],
)
def test_the_message_has_the_command_that_makes_just_this_folder(
    tmp_path, workload, folder, given, words
):
    flags = RunnerFlags((f"--data_dir={tmp_path / folder}",))
    with pytest.raises(LaunchError) as raised:
        data_folders.require_data(workload, flags)
    message = str(raised.value)
    assert f"dataset_setup.py --data_dir={tmp_path / given} " in message
    for word in (*words, "is missing"):
        assert word in message
