"""Workloads with the structures of speech, text, click and image data, small, synthetic."""

import torch
import torch.nn.functional as F
from torch import nn

from submission.algoperf_compat import spec

CLASSES = 6


class Workload:
    """What all of them share; `update_batch_norm` is passed on to those that heed it."""

    step_hint = 100
    metrics_logger = None

    def model_fn(
        self, params, augmented_and_preprocessed_input_batch, model_state, mode, rng,
        update_batch_norm,
    ):  # fmt: skip
        params.train(mode == spec.ForwardPassMode.TRAIN)
        with torch.set_grad_enabled(mode == spec.ForwardPassMode.TRAIN and torch.is_grad_enabled()):
            return self.call(params, augmented_and_preprocessed_input_batch), model_state

    def call(self, model, batch):
        return model(batch["inputs"])


class MaskedNorm(nn.Module):
    """A batch norm of padded sequences, which updates its statistics whenever it trains."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x, paddings):
        mean = self.running_mean
        if self.training:
            kept = (1 - paddings).unsqueeze(-1)
            mean = (x * kept).sum((0, 1)) / kept.sum()
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
        return (x - mean) * (1 + self.scale)


class Halve(nn.Module):
    """Joins neighbours in time; hands on the paddings."""

    def forward(self, x, paddings):
        n, t, d = x.shape
        return x.reshape(n, t // 2, 2 * d), paddings[:, ::2]


class SpeechNet(nn.Module):
    """Sequences of half the length, with a pair as input and as output."""

    def __init__(self, batch_norm=True):
        super().__init__()
        self.halve = Halve()
        self.body = nn.Linear(6, 8)
        self.norm = MaskedNorm(8) if batch_norm else None
        self.head = nn.Linear(8, CLASSES)

    def forward(self, pair):
        x, paddings = self.halve(*pair)
        x = torch.tanh(self.body(x))
        if self.norm is not None:
            x = self.norm(x, paddings)
        return self.head(x), paddings


class SpeechWorkload(Workload):
    """CTC loss, divided by the number of labels."""

    loss_type = spec.LossType.CTC_LOSS

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        (labels, label_paddings), (logits, paddings) = label_batch, logits_batch
        lengths = (1 - label_paddings).sum(1).long()
        losses = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), labels, (1 - paddings).sum(1).long(), lengths,
            reduction="none",
        )  # fmt: skip
        return {"summed": losses.sum(), "n_valid_examples": lengths.sum(), "per_example": losses}


def speech_batch(lengths=(8, 6, 4), total=8, seed=0):
    """Sequences of the given lengths (even), padded with large numbers up to a total."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(lengths), total, 3), 50.0)
    for row, length in zip(x, lengths, strict=True):
        row[:length] = torch.randn(length, 3, generator=generator)
    ends = torch.tensor(lengths).unsqueeze(1)
    paddings = (torch.arange(total) >= ends).float()
    labels = torch.randint(1, CLASSES, (len(lengths), 2), generator=generator)
    return {"inputs": (x, paddings), "targets": (labels, torch.zeros(len(lengths), 2))}


class TextNet(nn.Module):
    """An encoder and a decoder on fields of their own, which share an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 5)
        self.encode = nn.Linear(5, 5)
        self.memory = nn.Linear(5, 5)
        self.decode = nn.Linear(5, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, source, target, source_mask):
        source = torch.tanh(self.memory(torch.tanh(self.encode(self.embedding(source)))))
        pooled = torch.where(source_mask.unsqueeze(-1), source, 0).sum(1, keepdim=True)
        return self.head(torch.tanh(self.decode(self.embedding(target)) + pooled))


class TextWorkload(Workload):
    """Cross-entropy of tokens; fields as pipelines that pack texts give them."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY

    def call(self, model, batch):
        return model(batch["inputs"], batch["targets"], batch["inputs_segmentation"] > 0)

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = F.cross_entropy(logits_batch.transpose(1, 2), label_batch, reduction="none")
        losses = losses * mask_batch
        return {"summed": losses.sum(), "n_valid_examples": mask_batch.sum(), "per_example": losses}


def text_batch(lengths=((5, 3), (2, 6)), total=6, seed=0):
    """Pairs of a source and a target length each, padded with a token that also occurs in texts."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for index, field in enumerate(("inputs", "targets")):
        tokens = torch.full((len(lengths), total), CLASSES - 1)
        segmentation = torch.zeros(len(lengths), total, dtype=torch.long)
        for row, own in enumerate(lengths):
            length = own[index]
            tokens[row, :length] = torch.randint(CLASSES, (length,), generator=generator)
            segmentation[row, :length] = 1
        batch |= {field: tokens, f"{field}_segmentation": segmentation}
    return batch | {"weights": (batch["targets_segmentation"] > 0).long()}


class ClickNet(nn.Module):
    """Chunks of an embedding table that are used without an nn.Embedding, and one logit."""

    def __init__(self):
        super().__init__()
        self.chunks = nn.ParameterList(torch.randn(50, 4) for _ in range(2))
        self.body = nn.Linear(3 * 4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, indices):
        rows = torch.cat(list(self.chunks))[indices]
        return self.head(F.relu(self.body(rows.flatten(1))))


class ClickWorkload(Workload):
    """Sigmoid cross-entropy of one logit."""

    loss_type = spec.LossType.SIGMOID_CROSS_ENTROPY

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = F.binary_cross_entropy_with_logits(
            logits_batch.flatten(), label_batch.flatten(), reduction="none"
        )
        mask = torch.ones_like(losses) if mask_batch is None else mask_batch.flatten()
        losses = losses * mask
        return {"summed": losses.sum(), "n_valid_examples": mask.sum(), "per_example": losses}


class ReconstructionWorkload(Workload):
    """Absolute error, averaged over the pixels of an image."""

    loss_type = spec.LossType.MEAN_ABSOLUTE_ERROR

    def call(self, model, batch):
        return model(batch["inputs"].unsqueeze(1)).squeeze(1)

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = (logits_batch - label_batch).abs().mean((1, 2)) * mask_batch
        return {"summed": losses.sum(), "n_valid_examples": mask_batch.sum(), "per_example": losses}


def reconstruction_net():
    """A convolutional net without and with bias, in-place activations, instance norm."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.InstanceNorm2d(4),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 1, 1),
    )
