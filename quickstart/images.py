"""Small images: scikit-learn's handwritten digits, or CIFAR-10 from a folder of the user's."""

import hashlib
import io
import itertools
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quickstart.errors import QuickstartError

SPLIT_SEED = 20260101
CIFAR_VALIDATION_IMAGES = 5000
_CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_PACKED = ("cifar10_jpeg_train.npz", "cifar10_jpeg_test.npz")


@dataclass(frozen=True)
class ImageData:
    """Images, classes and splits.

    Attributes:
        name: 'digits' or 'cifar10'.
        images: (images, channels, height, width), unsigned bytes.
        classes: (images,).
        splits: numbers of the images in 'train', 'validation' and 'test'.
        augment: whether training images are flipped and shifted at random.
    """

    name: str
    images: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.int64]
    splits: dict[str, npt.NDArray[np.int64]]
    augment: bool

    @property
    def checksum(self) -> str:
        """SHA-256 of images and classes, which names this data set."""
        return hashlib.sha256(self.images.tobytes() + self.classes.tobytes()).hexdigest()


def load(data_dir: Path | None) -> ImageData:
    """CIFAR-10 if `data_dir` is given, else the digits.

    Args:
        data_dir: a folder with CIFAR-10, either the original `cifar-10-batches-py` (or its parent)
            or the two packed archives `cifar10_jpeg_train.npz` and `cifar10_jpeg_test.npz` (arrays
            `buf`, `off`, `y`; image i is the JPEG file buf[off[i]:off[i+1]]).

    Raises:
        QuickstartError: if the folder has neither, or a file in it is damaged.
    """
    return load_digits() if data_dir is None else load_cifar10(data_dir)


def load_digits() -> ImageData:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries, split 80/10/10 at random."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    first, second = int(0.8 * len(order)), int(0.9 * len(order))
    return ImageData(
        name="digits",
        images=(digits.images[:, None] * (255 / 16)).round().astype(np.uint8),
        classes=digits.target.astype(np.int64),
        splits={
            "train": order[:first],
            "validation": order[first:second],
            "test": order[second:],
        },
        augment=False,
    )


def load_cifar10(data_dir: Path) -> ImageData:
    """CIFAR-10 from a folder: 45,000 training, 5,000 validation and 10,000 test images."""
    folder = data_dir / "cifar-10-batches-py"
    folder = folder if folder.is_dir() else data_dir
    packed = [data_dir / name for name in _PACKED]
    if all((folder / name).exists() for name in [*_CIFAR_BATCHES, "test_batch"]):
        parts = [_read_python_batch(folder / name) for name in [*_CIFAR_BATCHES, "test_batch"]]
    elif all(path.exists() for path in packed):
        parts = [_read_packed_jpegs(path) for path in packed]
    else:
        raise QuickstartError(
            f"no CIFAR-10 in {data_dir}: --data_dir must hold cifar-10-batches-py/ or "
            f"{_PACKED[0]} and {_PACKED[1]}; leave --data_dir out to train on the digits"
        )
    images = np.concatenate([images for images, _ in parts])
    classes = np.concatenate([classes for _, classes in parts])
    num_train = len(images) - len(parts[-1][0])
    order = np.random.default_rng(SPLIT_SEED).permutation(num_train)
    return ImageData(
        name="cifar10",
        images=images,
        classes=classes,
        splits={
            "train": order[CIFAR_VALIDATION_IMAGES:],
            "validation": order[:CIFAR_VALIDATION_IMAGES],
            "test": np.arange(num_train, len(images)),
        },
        augment=True,
    )


def augment(
    images: npt.NDArray[np.uint8], generator: np.random.Generator, shift: int = 4
) -> npt.NDArray[np.uint8]:
    """Mirrors half of the images and moves each by up to `shift` pixels, (N, C, H, W) to same."""
    count, _, height, width = images.shape
    mirrored = np.less(generator.random(count), 0.5)
    images = np.where(mirrored.reshape(-1, 1, 1, 1), images[..., ::-1], images)
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    top, left = generator.integers(0, 2 * shift + 1, size=(2, count))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    image = np.arange(count)[:, None, None]
    picked = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


class ImageQueue:
    """Endless stream of image batches; the n-th batch depends on the seed and on n alone."""

    def __init__(
        self, data: ImageData, batch_size: int, seed: list[int], device: torch.device
    ) -> None:
        self._data, self._batch_size, self._seed, self._device = data, batch_size, seed, device
        self._per_epoch = len(data.splits["train"]) // batch_size
        if self._per_epoch == 0:
            raise ValueError(f"{len(data.splits['train'])} images do not fill one batch")
        self.position = 0

    def __iter__(self) -> "ImageQueue":
        return self

    def __next__(self) -> dict[str, Any]:
        epoch, index = divmod(self.position, self._per_epoch)
        order = np.random.default_rng([*self._seed, epoch]).permutation(self._data.splits["train"])
        members = order[index * self._batch_size : (index + 1) * self._batch_size]
        pixels = self._data.images[members]
        if self._data.augment:
            pixels = augment(pixels, np.random.default_rng([*self._seed, epoch, index]))
        self.position += 1
        return image_batch(pixels, self._data.classes[members], self._device)

    def skip_to(self, position: int) -> None:
        """Moves to where `position` batches have been drawn."""
        self.position = position


def image_batch(
    pixels: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64], device: torch.device
) -> dict[str, Any]:
    """'inputs' in [-1, 1], (images, channels, height, width), and 'targets', (images,)."""
    return {
        "inputs": torch.from_numpy(pixels).to(device).float().div_(127.5).sub_(1),
        "targets": torch.from_numpy(classes).to(device),
    }


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain containers and arrays, and refuses everything that could run code."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}")
        return super().find_class(module, name)


def _read_python_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        images = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        return images, np.asarray(content[b"labels"], dtype=np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise QuickstartError(f"{path} is not a CIFAR-10 batch ({error}): get it again") from error


def _read_packed_jpegs(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from PIL import Image

    try:
        with np.load(path, allow_pickle=False) as archive:
            buffer, offsets, classes = archive["buf"], archive["off"], archive["y"]
        files = (buffer[a:b].tobytes() for a, b in itertools.pairwise(offsets))
        images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
        return np.stack(images).transpose(0, 3, 1, 2), classes.astype(np.int64)
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise QuickstartError(f"{path} is damaged ({error}): get it again") from error
