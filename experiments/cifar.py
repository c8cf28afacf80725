"""CIFAR-10 in its python batches, as an image folder, or as packed JPEG files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickstart import images
from quickstart.errors import QuickstartError
from quickstart.images import ImageData

FOLDER_SUFFIXES = (".png", ".jpg", ".jpeg")


def load(data_dir: Path) -> ImageData:
    """CIFAR-10 from a folder: python batches, packed JPEG arrays, or train/CLASS/*.png, test/...

    Raises:
        QuickstartError: none of the three is there, or a file is damaged.
    """
    data_dir = data_dir.expanduser()
    if (data_dir / "train").is_dir() and (data_dir / "test").is_dir():
        return load_image_folder(data_dir)
    return replace(images.load_cifar10(data_dir), name=name_of(data_dir))


def name_of(data_dir: Path) -> str:
    """What the CIFAR-10 of a folder is called in results: whether it is packed JPEG files."""
    python = any(path.is_file() for path in data_dir.glob("**/data_batch_1"))
    return "CIFAR-10" if python else "JPEG-recompressed CIFAR-10"


def load_image_folder(data_dir: Path) -> ImageData:
    """An image folder: train/CLASS/IMAGE and test/CLASS/IMAGE, all images of one size.

    Raises:
        QuickstartError: classes differ between the two, there are no images, or sizes differ.
    """
    names = {split: _classes(data_dir / split) for split in ("train", "test")}
    if names["train"] != names["test"]:
        raise QuickstartError(
            f"{data_dir}: train/ has the classes {names['train']}, test/ has {names['test']}: "
            "both need one folder per class, with the same names"
        )
    parts = [_read_split(data_dir / split, names["train"]) for split in ("train", "test")]
    train = len(parts[0][0])
    order = np.random.default_rng(images.SPLIT_SEED).permutation(train)
    held_out = train // 10
    return ImageData(
        name=data_dir.name,
        images=np.concatenate([pixels for pixels, _ in parts]),
        classes=np.concatenate([classes for _, classes in parts]),
        splits={
            "train": order[held_out:],
            "validation": order[:held_out],
            "test": np.arange(train, train + len(parts[1][0])),
        },
        augment=True,
    )


def tensors(
    data: ImageData, members: npt.NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], [n, C, H, W], and classes, [n]."""
    pixels = torch.from_numpy(data.images[members]).to(device).float() / 127.5 - 1
    return pixels, torch.from_numpy(data.classes[members]).to(device)


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _read_split(
    folder: Path, classes: list[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from PIL import Image

    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in FOLDER_SUFFIXES:
                try:
                    with Image.open(path) as image:
                        pixels.append(np.asarray(image.convert("RGB")))
                except OSError as error:
                    raise QuickstartError(f"{path} is damaged ({error}): get it again") from error
                labels.append(label)
    if len({image.shape for image in pixels}) != 1:
        kinds = "no images" if not pixels else "images of different sizes"
        raise QuickstartError(f"{folder} holds {kinds}: folders of equal-sized images are needed")
    return np.stack(pixels).transpose(0, 3, 1, 2), np.array(labels, dtype=np.int64)
