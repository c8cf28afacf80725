"""A network of LSTMs over letters, in the shape of AlgoPerf's DeepSpeech."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LetterLSTM(nn.Module):
    """Maps letters [N, T] to logits [N, repeats * T, outputs].

    Args:
        letters: number of different ones.
        outputs: number of logits a frame.
        width: features of the letters, and of each direction of each LSTM.
        depth: number of LSTMs above each other.
        repeats: frames a letter.
    """

    def __init__(
        self, letters: int, outputs: int, width: int, depth: int, repeats: int = 2
    ) -> None:
        super().__init__()
        self.repeats = repeats
        self.embedding = nn.Embedding(letters, width)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, letters: Tensor) -> Tensor:
        """The logits."""
        frames = torch.repeat_interleave(self.embedding(letters), self.repeats, 1)
        logits: Tensor = self.head(self.lstm(frames)[0])
        return logits
