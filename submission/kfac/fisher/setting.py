"""Which of the paper's two settings a model is in (section 3.1 and appendix B.4).

Expand setting: every shared position has a loss term of its own (translation, segmentation, node
labels). Reduce setting: positions are aggregated before the loss (classification of images by a
convolutional net or a ViT, of graphs). It shows in the outputs: beyond examples and classes they
have dimensions left, or they do not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from ..operations.sharing import RaggedBatch, Segments, SharingRule
from .likelihoods import Categorical, Likelihood

logger = logging.getLogger(__name__)


def detect_setting(
    likelihood: Likelihood, logits: Tensor, sharing: SharingRule, examples: Iterable[int] = ()
) -> tuple[str, str]:
    """("expand" or "reduce", the reason in words), from the outputs of one forward pass.

    Args:
        likelihood: says which dimensions of the logits are terms. Of Bernoulli and Gaussian
            likelihoods the last dimension are the outputs of one position.
        sharing: as given to `record`. With ragged rows, outputs for every row of a kind of which
            examples have several (nodes) mean the expand setting.
        examples: the numbers of examples that the layers had. Outputs for more of them than any
            layer has are positions folded into the first dimension: the expand setting.
    """
    shape = likelihood.term_shape(logits)
    positions = shape[1:] if isinstance(likelihood, Categorical) else shape[1:-1]
    outputs = logits.shape[likelihood.example_dim(logits)]
    kinds = [s for s in _segments(sharing) if s.rows == outputs]
    if kinds and all(s.rows != s.num_segments for s in kinds):
        return "expand", f"the {outputs} rows of the outputs are several to an example"
    most = max(examples, default=outputs)
    if outputs > most:
        return "expand", f"there are outputs for {outputs} positions of {most} examples"
    if positions.numel() > 1:
        return "expand", f"every example has {positions.numel()} positions with a loss of their own"
    return "reduce", "every example has one loss term for all its positions"


def warn_of_folded_positions(
    examples: Mapping[str, int], likelihood: Likelihood, logits: Tensor
) -> None:
    """Says where positions seem to be taken for examples, which matters to K-FAC-reduce.

    Args:
        examples: layer name -> number of examples that it had.
    """
    # Where a layer's number is 1 its output is broadcast over the examples. The outputs may have
    # been flattened for the loss, as language models do.
    outputs = logits.shape[likelihood.example_dim(logits)]
    numbers = {outputs, *(number for number in examples.values() if number > 1)}
    # Folded positions are a multiple of the examples. Other numbers are of rows that belong to no
    # example, such as a table of relative positions that is looked up once.
    fewer = {name: [n for n in numbers if n < m and m % n == 0] for name, m in examples.items()}
    odd = [name for name, found in fewer.items() if found]
    if odd:
        logger.warning(
            "K-FAC-reduce: there seem to be %d examples, but layers have another number of "
            "them (%s: %d): if several rows of a layer belong to one example, say so "
            "(record(sharing=...))",
            min(fewer[odd[0]]),
            ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else ""),
            examples[odd[0]],
        )


def _segments(rule: SharingRule) -> Iterator[Segments]:
    """All segments that a rule speaks of."""
    if isinstance(rule, Segments):
        yield rule
    elif isinstance(rule, RaggedBatch):
        yield from rule.kinds.values()
    elif isinstance(rule, Mapping):
        for value in rule.values():
            yield from _segments(value)
