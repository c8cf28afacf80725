"""Four small tasks on real data behind one interface.

| task | net | data | measured on the validation set |
|---|---|---|---|
| `molecules` | GraphNetwork, 2 rounds of message passing | the quickstart's molecules | mAP |
| `vit` | ViT | CIFAR-10, or scikit-learn's digits | accuracy |
| `wide_resnet` | Wide ResNet with Fixup, no normalisation | the same | accuracy |
| `gpt` | GPT over characters, output layer tied to embedding | the King James Bible | loss |

A task's first parameters and its training batches depend on the seed alone, so that all methods
start from the same point and see the same batches.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import cifar, corpus
from experiments.models.gpt import GPT, GPTShape
from experiments.models.wide_resnet import WideResNet
from quickstart import images, molecules
from quickstart.errors import QuickstartError
from quickstart.graphs import BatchBudget, GraphBatcher, TrainingQueue
from quickstart.images import ImageData
from quickstart.metrics import mean_average_precision
from quickstart.models import GraphNetwork, ViT
from submission.batch_structure import sharing_of
from submission.kfac import Bernoulli, Categorical, Likelihood
from submission.kfac.operations.sharing import SharingRule

Batch = Mapping[str, Any]
NAMES = ("molecules", "vit", "wide_resnet", "gpt")


@dataclasses.dataclass(frozen=True)
class Length:
    """Steps of a run, steps between evaluations, and examples per batch."""

    steps: int
    eval_every: int
    batch_size: int


class Task(ABC):
    """What training and K-FAC have to know about a task.

    Attributes:
        name: one of `NAMES`.
        data: names the data set.
        metric: name of what `evaluate` returns.
        higher_is_better: whether a larger value of it is a better one.
        likelihood: of the loss, for K-FAC.
        output_layer: name of the last layer, which Muon leaves to Adam.
        length: of a run.
        sizes: of the net and of the validation set.
    """

    name: str
    data: str
    metric: str
    higher_is_better: bool
    likelihood: Likelihood = Categorical()
    output_layer: str = "head"
    exact_fisher = True  # whether the ablation tries it: a pass for every output of an example

    def __init__(self, length: Length, device: torch.device, sizes: Mapping[str, int]) -> None:
        self.length, self.device, self.sizes = length, device, dict(sizes)

    @property
    def setting(self) -> dict[str, Any]:
        """All that runs of this task have in common, as plain values."""
        return {"data": self.data, **dataclasses.asdict(self.length), **self.sizes}

    def make_model(self, seed: int) -> nn.Module:
        """The net with its first parameters."""
        torch.manual_seed(seed)
        return self._build_model().to(self.device)

    @abstractmethod
    def _build_model(self) -> nn.Module: ...

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches with 'inputs', 'targets' and, where labels are missing,
        'weights'."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean loss."""
        return F.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten())

    def sharing(self, model: nn.Module, batch: Batch) -> SharingRule:
        """How rows share weights, for K-FAC."""
        del model, batch
        return None

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """The metric on the validation set; the model is left in training mode."""

    def _outputs(self, model: nn.Module, batches: list[Batch]) -> Tensor:
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(batch["inputs"]) for batch in batches])
        model.train()
        return logits


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


class Text(Task):
    """The next character of a text, at every position of a window."""

    name = "gpt"
    metric = "validation loss"
    higher_is_better = False
    exact_fisher = False  # thousands of passes

    def __init__(self, length: Length, device: torch.device, content: str, sizes: Sizes) -> None:
        own = {"window": sizes.window, "width": sizes.gpt_width, "depth": sizes.gpt_depth}
        super().__init__(length, device, {**own, "validation_windows": sizes.validation_windows})
        vocabulary, codes = np.unique(np.array(list(content)), return_inverse=True)
        characters = torch.from_numpy(codes.astype(np.int64)).to(device)
        self._window = sizes.window
        self._shape = GPTShape(len(vocabulary), sizes.window, sizes.gpt_depth, 4, sizes.gpt_width)
        split = len(codes) * 9 // 10
        self._train, rest = characters[:split], characters[split:]
        self.data = f"the King James Bible, {len(self._train)} characters"
        last = len(rest) - sizes.window - 1
        starts = torch.linspace(0, last, sizes.validation_windows, device=device).long()
        self._validation = [_windows(rest, part, sizes.window) for part in torch.split(starts, 64)]

    def _build_model(self) -> nn.Module:
        return GPT(self._shape)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        last = len(self._train) - self._window
        while True:
            starts = torch.randint(last, (self.length.batch_size,), generator=generator)
            yield _windows(self._train, starts.to(self.device), self._window)

    def evaluate(self, model: nn.Module) -> float:
        targets = torch.cat([batch["targets"] for batch in self._validation])
        return float(self.loss(self._outputs(model, self._validation), {"targets": targets}))


def _windows(characters: Tensor, starts: Tensor, window: int) -> Batch:
    found = characters[starts[:, None] + torch.arange(window + 1, device=starts.device)]
    return {"inputs": found[:, :-1], "targets": found[:, 1:]}


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
    window: int = 64
    gpt_width: int = 64
    gpt_depth: int = 2
    validation_windows: int = 256


DEFAULT = Sizes(
    {
        "molecules": Length(500, 25, 128),
        "vit": Length(300, 20, 64),
        "wide_resnet": Length(300, 20, 64),
        "gpt": Length(300, 20, 32),
    }
)
SMALL = Sizes(
    {
        "molecules": Length(40, 10, 64),
        "vit": Length(40, 10, 32),
        "wide_resnet": Length(40, 10, 32),
        "gpt": Length(40, 10, 16),
    },
    graph_width=16,
    vit_width=16,
    vit_depth=1,
    train_images=2_000,
    validation_images=200,
    gpt_width=16,
    gpt_depth=1,
    validation_windows=32,
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
        content = corpus.read_archive(corpus.fetch_archive(downloads / "downloads"))
        return Text(length, device, content, sizes)
    data = load_images(image_dir, sizes)

    width, depth = sizes.vit_width, sizes.vit_depth

    def vit(channels: int, side: int) -> nn.Module:
        return ViT(10, channels, side // 4, width, depth, 4, 2 * width)

    def wide_resnet(channels: int, side: int) -> nn.Module:
        del side
        return WideResNet(10, sizes.resnet_width, channels=channels)

    if name == "vit":
        return Images(name, length, device, data, {"width": width, "depth": depth}, vit)
    return Images(name, length, device, data, {"width": sizes.resnet_width}, wide_resnet)


def load_images(image_dir: Path | None, sizes: Sizes) -> ImageData:
    """CIFAR-10 at a lower resolution (means of squares of pixels) and thinned out, or the digits.

    Images are not augmented: a run sees less than a few epochs.
    """
    if image_dir is None:
        return images.load_digits()
    data = cifar.load(image_dir)
    factor = max(data.images.shape[-1] // sizes.image_side, 1)
    parts = {"train": sizes.train_images, "validation": sizes.validation_images}
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
