"""A miniature ImageNet as AlgoPerf's PyTorch workloads read it.

    train/CLASS/*.jpg, val/CLASS/*.jpg               torchvision's ImageFolder
    imagenet_v2/matched-frequency/3.0.0              TFDS, the test split

Each class is one photograph that ships with scikit-image or scikit-learn; its examples are random
square crops of it. Splits do not overlap: each crops from its own vertical band.
"""

# Pillow brings its own types, but need not be installed where types are checked.
# mypy: disable-error-code="import-not-found"

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from workloads_overrides.miniature import manifest

WORKLOADS = [
    "imagenet_resnet",
    "imagenet_resnet_silu",
    "imagenet_resnet_gelu",
    "imagenet_resnet_large_bn_init",
    "imagenet_vit",
    "imagenet_vit_glu",
    "imagenet_vit_post_ln",
    "imagenet_vit_map",
]
PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
# Shares of a photograph's width, from left to right.
BANDS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
SIZE = 224
"""Side of the stored crops in pixels: AlgoPerf's own crops are of this size."""


def write(folder: Path, train: int, evaluation: int, seed: int) -> None:
    """Writes `train` examples, and `evaluation` for validation and for test, over all classes.

    Raises:
        ValueError: A count does not divide by the number of classes.
    """
    classes = len(PHOTOGRAPHS)
    if train % classes or evaluation % classes:
        raise ValueError(f"--train and --evaluation must be multiples of {classes}, one per class")
    per_class = {
        "train": train // classes,
        "val": evaluation // classes,
        "test": evaluation // classes,
    }
    generator = np.random.default_rng(seed)
    test_examples: list[dict[str, Any]] = []
    for label, (package, path) in enumerate(PHOTOGRAPHS):
        image = _open(package, path)
        for split, count in per_class.items():
            for number, jpeg in enumerate(crops(image, BANDS[split], count, generator)):
                name = f"{number:04d}.jpg"
                if split == "test":
                    test_examples.append(
                        {"image": io.BytesIO(jpeg), "label": label, "file_name": f"{label}/{name}"}
                    )
                    continue
                class_folder = folder / split / f"{label:03d}_{Path(path).stem}"
                class_folder.mkdir(parents=True, exist_ok=True)
                (class_folder / name).write_bytes(jpeg)
    _write_imagenet_v2(folder, test_examples)
    manifest.write(folder, WORKLOADS, manifest.properties_for(train, evaluation, evaluation))


def crops(
    image: Image.Image, band: tuple[float, float], count: int, generator: np.random.Generator
) -> Iterator[bytes]:
    """Yields `count` square crops (JPEG, `SIZE` x `SIZE`, half of them mirrored) from a band."""
    left, right = (int(share * image.width) for share in band)
    largest = min(right - left, image.height)
    for _ in range(count):
        side = int(generator.integers(largest // 2, largest, endpoint=True))
        x = int(generator.integers(left, right - side, endpoint=True))
        y = int(generator.integers(0, image.height - side, endpoint=True))
        crop = image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE))
        if generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def _open(package: str, path: str) -> Image.Image:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(package, name=package)
    return Image.open(Path(found.submodule_search_locations[0]) / path).convert("RGB")


def _write_imagenet_v2(folder: Path, examples: list[dict[str, Any]]) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    registered = tfds.builder("imagenet_v2/matched-frequency:3.0.0")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet_v2",
        version="3.0.0",
        config=registered.builder_config,
        features=registered.info.features,
        split_datasets={"test": list(enumerate(examples))},
        data_dir=folder,
    )
