import io
import json

import numpy as np
import pytest

from workloads_overrides.errors import LaunchError
from workloads_overrides.miniature import __main__ as command
from workloads_overrides.miniature import manifest, molecules


def molecule(nodes, bonds):
    return {"num_nodes": np.array([nodes]), "num_edges": np.array([bonds])}


@pytest.mark.parametrize(
    ("examples", "needed"),
    [
        ([molecule(26, 10)] * 100, 100),  # as many nodes as AlgoPerf has room for
        ([molecule(52, 10)] * 100, 200),  # nodes decide
        ([molecule(1, 56)] * 100, 200),  # edges decide: each bond is two of them
    ],
)
def test_the_evaluation_batch_holds_every_graph_with_a_margin(examples, needed):
    size = molecules.batch_size_for(examples)
    assert needed < size < 1.25 * needed
    assert size % 8 == 0  # divides over 2, 4 and 8 processes


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    properties = manifest.properties_for(train=300, evaluation=64, eval_batch_size=88)
    manifest.write(tmp_path, ["ogbg", "ogbg_gelu"], properties)
    assert manifest.read_properties(tmp_path, "ogbg_gelu") == properties


@pytest.mark.parametrize("text", ["", "{", "[]", '{"workloads": ["ogbg"]}', '{"workloads": 3}'])
def test_a_damaged_manifest_is_an_error_that_says_what_to_do(tmp_path, text):
    (tmp_path / manifest.FILE_NAME).write_text(text)
    with pytest.raises(LaunchError, match=r"damaged.*make the folder again"):
        manifest.read_properties(tmp_path, "ogbg")


def test_a_folder_is_written_whole(tmp_path):
    folder = tmp_path / "deep" / "data"
    command.write_whole(folder, lambda part: (part / "file").write_text("x") and None)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert (folder / "file").read_text() == "x"


def test_or_not_at_all(tmp_path):
    def fail(part):
        (part / "file").write_text("x")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        command.write_whole(tmp_path / "data", fail)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit):
        command.main(["ogbg", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_packages_are_named_in_one_line(tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise ModuleNotFoundError("No module named 'rdkit'")

    monkeypatch.setattr(command, "_write", fail)
    assert command.main(["ogbg", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert "No module named 'rdkit'; install with pip" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [["--train=0"], ["--evaluation=-1"]])
def test_sizes_must_be_positive(tmp_path, sizes):
    with pytest.raises(SystemExit):
        command.main(["imagenet", str(tmp_path / "data"), *sizes])


def test_crops_come_from_their_band_and_from_nowhere_else():
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed here")
    from workloads_overrides.miniature import photographs

    pixels = np.zeros((300, 500, 3), np.uint8)
    pixels[:, 300:400] = 255  # the band of the validation split is white
    image = image_module.fromarray(pixels)
    made = list(photographs.crops(image, photographs.BANDS["val"], 5, np.random.default_rng(0)))
    assert len(made) == 5
    for jpeg in made:
        crop = np.asarray(image_module.open(io.BytesIO(jpeg)))
        assert crop.shape == (photographs.SIZE, photographs.SIZE, 3)
        assert crop.min() > 200


def test_the_manifest_is_plain_json(tmp_path):
    manifest.write(tmp_path, ["ogbg"], manifest.properties_for(1, 1, 8))
    assert set(json.loads((tmp_path / manifest.FILE_NAME).read_text())) == {
        "workloads",
        "properties",
    }
