from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quickstart import images
from quickstart.errors import QuickstartError


def test_digits() -> None:
    data = images.load(None)
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.max() == 255
    assert sum(map(len, data.splits.values())) == 1797


def write_python_batches(folder: Path, count: int) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(6, count, 3072), dtype=np.uint8)
    for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        content = {b"data": pixels[i], b"labels": [i] * count}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return pixels


def test_cifar10_python_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CIFAR_VALIDATION_IMAGES", 4)
    pixels = write_python_batches(tmp_path / "cifar-10-batches-py", 3)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = images.load(folder)
        assert data.images.shape == (18, 3, 32, 32)
        np.testing.assert_array_equal(data.images[4].ravel(), pixels[1, 1])
        assert data.classes.tolist() == sorted([0, 1, 2, 3, 4, 5] * 3)
        assert [len(m) for m in data.splits.values()] == [11, 4, 3]


class _Malicious:
    def __reduce__(self):
        return os.system, ("true",)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    write_python_batches(tmp_path / "c", 2)
    (tmp_path / "c" / "data_batch_3").write_bytes(pickle.dumps({b"data": _Malicious()}))
    with pytest.raises(QuickstartError, match=r"data_batch_3 is not a CIFAR-10 batch .*system"):
        images.load(tmp_path / "c")


def write_packed(path: Path, classes: list[int]) -> None:
    files = []
    for value in classes:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (20 * value, 0, 0)).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, buf=np.concatenate(files), off=offsets, y=np.array(classes))


def test_packed_jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CIFAR_VALIDATION_IMAGES", 2)
    write_packed(tmp_path / "cifar10_jpeg_train.npz", [1, 5, 9])
    write_packed(tmp_path / "cifar10_jpeg_test.npz", [7])
    data = images.load(tmp_path)
    assert data.classes.tolist() == [1, 5, 9, 7]
    assert abs(int(data.images[2, 0].mean()) - 180) < 3
    (tmp_path / "cifar10_jpeg_test.npz").write_bytes(b"damaged")
    with pytest.raises(QuickstartError, match=r"cifar10_jpeg_test\.npz is damaged"):
        images.load(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match=r"no CIFAR-10 in .*--data_dir must hold"):
        images.load(tmp_path / "nowhere")


def test_augmentation_moves_and_mirrors() -> None:
    pixels = np.zeros((64, 1, 16, 16), np.uint8)
    pixels[:, 0, 8, 4] = 255
    moved = images.augment(pixels, np.random.default_rng(0))
    assert moved.shape == pixels.shape
    assert (moved.reshape(64, -1).max(axis=1) == 255).all()
    rows, columns = np.nonzero(moved[:, 0])[1:]
    assert (np.abs(rows - 8) <= 4).all()
    assert len(set(columns)) > 9  # mirrored ones lie around 11, the others around 4
    again = images.augment(pixels, np.random.default_rng(0))
    np.testing.assert_array_equal(moved, again)
