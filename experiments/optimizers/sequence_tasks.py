"""Tasks on sequences: the next character of a text, and how a word is pronounced."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.gpt import GPT, GPTShape
from experiments.models.lstm import LetterLSTM
from experiments.optimizers.task import Batch, Length, Task
from experiments.pronunciations import Pronunciations


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the GPT, and of its validation set."""

    window: int
    width: int
    depth: int
    validation_windows: int


class Text(Task):
    """The next character of a text, at every position of a window."""

    name = "gpt"
    metric = "validation loss"
    higher_is_better = False
    exact_fisher = False  # thousands of passes

    def __init__(
        self, length: Length, device: torch.device, content: str, sizes: TextSizes
    ) -> None:
        super().__init__(length, device, asdict(sizes))
        vocabulary, codes = np.unique(np.array(list(content)), return_inverse=True)
        characters = torch.from_numpy(codes.astype(np.int64)).to(device)
        self._window = sizes.window
        self._shape = GPTShape(len(vocabulary), sizes.window, sizes.depth, 4, sizes.width)
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


class Words(Task):
    """The phonemes of English words from their letters, with a CTC loss.

    A batch has words of one length, two frames a letter, so that nothing is padded; the loss is
    the sum over words, divided by the number of frames. The metric is divided by that of phonemes.
    """

    name = "lstm"
    metric = "validation loss"
    higher_is_better = False
    has_labels = False  # of single frames
    exact_fisher = False

    def __init__(
        self,
        length: Length,
        device: torch.device,
        content: Pronunciations,
        *,
        width: int,
        depth: int,
        validation_words: int,
    ) -> None:
        sizes = {"width": width, "depth": depth, "validation_words": validation_words}
        super().__init__(length, device, sizes)
        self._width, self._depth = width, depth
        self._alphabets = len(content.letters), len(content.phonemes)
        self.data = f"the CMU Pronouncing Dictionary, {len(content.splits['train'])} words"
        self._train = _by_length([content.words[i] for i in content.splits["train"]])
        chosen = content.splits["validation"][:validation_words]
        self._validation = [
            self._batch(words) for words in _by_length([content.words[i] for i in chosen]).values()
        ]

    def _batch(self, words: list[tuple[list[int], list[int]]]) -> Batch:
        targets = torch.tensor([p for _, spoken in words for p in spoken], device=self.device)
        lengths = torch.tensor([len(spoken) for _, spoken in words], device=self.device)
        inputs = torch.tensor([letters for letters, _ in words], device=self.device)
        return {"inputs": inputs, "targets": targets, "target_lengths": lengths}

    def _build_model(self) -> nn.Module:
        return LetterLSTM(*self._alphabets, self._width, self._depth)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = np.random.default_rng(seed)
        lengths = sorted(self._train)
        counts = np.array([len(self._train[length]) for length in lengths])
        while True:
            words = self._train[lengths[generator.choice(len(lengths), p=counts / counts.sum())]]
            drawn = generator.integers(len(words), size=self.length.batch_size)
            yield self._batch([words[i] for i in drawn])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return _ctc(logits, batch) / logits.shape[:2].numel()

    def evaluate(self, model: nn.Module) -> float:
        summed = sum(float(_ctc(self._outputs(model, [b]), b)) for b in self._validation)
        return summed / sum(len(batch["targets"]) for batch in self._validation)


def _by_length(
    words: list[tuple[list[int], list[int]]],
) -> dict[int, list[tuple[list[int], list[int]]]]:
    """The words by their number of letters, but for those with more phonemes than frames."""
    found: dict[int, list[tuple[list[int], list[int]]]] = {}
    for letters, spoken in words:
        repeated = sum(a == b for a, b in itertools.pairwise(spoken))
        if len(spoken) + repeated <= 2 * len(letters):
            found.setdefault(len(letters), []).append((letters, spoken))
    return found


def _ctc(logits: Tensor, batch: Batch) -> Tensor:
    """The CTC loss, summed over words, of logits [N, T, phonemes]."""
    frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), batch["targets"], frames, batch["target_lengths"],
        reduction="sum",
    )  # fmt: skip
