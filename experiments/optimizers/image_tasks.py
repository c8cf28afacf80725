"""Tasks on small images: their classes, and their reconstruction from a part of their spectrum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import cifar
from experiments.models.unet import UNet
from experiments.optimizers.task import Batch, Length, Task
from quickstart import images
from quickstart.errors import QuickstartError
from quickstart.images import ImageData
from submission.kfac import Gaussian, Likelihood


class Images(Task):
    """Classes of small images; the net comes from `build(channels, side)`."""

    metric = "validation accuracy"
    higher_is_better = True

    def __init__(
        self,
        name: str,
        length: Length,
        device: torch.device,
        data: ImageData,
        sizes: Mapping[str, int],
        build: Callable[[int, int], nn.Module],
    ) -> None:
        validation = len(data.splits["validation"])
        super().__init__(length, device, {**sizes, "validation_images": validation})
        self.name, self._images, self._build = name, data, build
        side = data.images.shape[-1]
        self.data = f"{data.name}, {len(data.splits['train'])} images of {side} x {side} pixels"
        self._validation: list[Batch] = []

    def _build_model(self) -> nn.Module:
        return self._build(*self._images.images.shape[1:3])

    def batches(self, seed: int) -> Iterator[Batch]:
        return images.ImageQueue(self._images, self.length.batch_size, [seed], self.device)

    def evaluate(self, model: nn.Module) -> float:
        if not self._validation:
            members = self._images.splits["validation"]
            self._validation = [
                images.image_batch(self._images.images[m], self._images.classes[m], self.device)
                for m in np.array_split(members, -(-len(members) // 250))
            ]
        classes = torch.cat([batch["targets"] for batch in self._validation])
        return float((self._outputs(model, self._validation).argmax(1) == classes).float().mean())


class Reconstruction(Task):
    """Grey images from a quarter of the lines of their spectrum, as fastMRI does it.

    What goes in are the images with the other lines set to zero, at zero mean and unit variance;
    the loss is the mean absolute error, at the same scale.
    """

    name = "unet"
    metric = "validation SSIM"
    higher_is_better = True
    likelihood: Likelihood = Gaussian(variance=1.0)  # stands in, as in the submission
    exact_fisher = False  # a pass for every pixel

    CENTRE, SHARE = 1 / 8, 1 / 4  # of the lines: those always kept, and all that are kept
    SPLIT_SEED = 20260101

    def __init__(
        self, length: Length, device: torch.device, data: ImageData, width: int, levels: int
    ) -> None:
        validation = len(data.splits["validation"])
        super().__init__(
            length, device, {"width": width, "levels": levels, "validation_images": validation}
        )
        self._shape = (width, levels)
        side = data.images.shape[-1]
        self.data = (
            f"{data.name} in grey, {len(data.splits['train'])} images of {side} x {side} pixels"
        )
        grey = torch.from_numpy(data.images).float().mean(1)
        grey = grey / grey.max()
        seen = self._from_part(grey)
        self._mean, self._std = seen.mean((1, 2), keepdim=True), seen.std((1, 2), keepdim=True)
        self._std = self._std.clamp(min=1e-3)
        self._whole = grey
        self._inputs, self._targets = (
            ((x - self._mean) / self._std).to(device) for x in (seen, grey)
        )
        self._members = {name: torch.from_numpy(m) for name, m in data.splits.items()}

    def _from_part(self, whole: Tensor) -> Tensor:
        """Magnitudes of the images without most lines; each image loses others."""
        number, lines = whole.shape[:2]
        generator = torch.Generator().manual_seed(self.SPLIT_SEED)
        place = torch.rand(number, lines, generator=generator)
        centre = max(int(lines * self.CENTRE), 2)
        first = lines // 2 - centre // 2
        place[:, first : first + centre] = 2.0
        kept = place >= place.sort(1, descending=True).values[:, [int(lines * self.SHARE) - 1]]
        mask = torch.fft.ifftshift(kept, dim=1)[:, :, None]
        result: Tensor = torch.fft.ifft2(torch.fft.fft2(whole) * mask).abs()
        return result

    def _build_model(self) -> nn.Module:
        return UNet(*self._shape)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        members = self._members["train"]
        while True:
            drawn = torch.randint(len(members), (self.length.batch_size,), generator=generator)
            chosen = members[drawn].to(self.device)
            yield {"inputs": self._inputs[chosen], "targets": self._targets[chosen]}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.l1_loss(logits, batch["targets"])

    def evaluate(self, model: nn.Module) -> float:
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure as ssim
        except ImportError as error:
            raise QuickstartError(
                "the task unet needs the package torchmetrics: run ./run.sh experiments "
                f"optimizers, which installs it ({error})"
            ) from error
        members = self._members["validation"]
        parts: list[Batch] = [
            {"inputs": self._inputs[m.to(self.device)]} for m in torch.split(members, 250)
        ]
        found = self._outputs(model, parts).cpu() * self._std[members] + self._mean[members]
        return float(ssim(found[:, None], self._whole[members][:, None], data_range=1.0))


def load_images(image_dir: Path | None, side: int, train: int, validation: int) -> ImageData:
    """CIFAR-10 at a lower resolution (means of squares of pixels) and thinned out, or the digits.

    Images are not augmented: a run sees less than a few epochs.

    Args:
        image_dir: CIFAR-10 (see `experiments.cifar`); None for scikit-learn's digits.
        side: of the images, where they are CIFAR-10's.
        train, validation: number of images.
    """
    if image_dir is None:
        return images.load_digits()
    data = cifar.load(image_dir)
    factor = max(data.images.shape[-1] // side, 1)
    parts = {"train": train, "validation": validation}
    members = [data.splits[part][:limit] for part, limit in parts.items()]
    kept = data.images[np.concatenate(members)]
    n, c, h, w = kept.shape
    means = kept.reshape(n, c, h // factor, factor, w // factor, factor).mean((3, 5))
    number = len(members[0])
    return ImageData(
        name=data.name,
        images=means.round().astype(np.uint8),
        classes=data.classes[np.concatenate(members)],
        splits={"train": np.arange(number), "validation": np.arange(number, n)},
        augment=False,
    )
