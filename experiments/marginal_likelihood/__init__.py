"""Tables 2 and 5: one weight decay per layer, learned by the Laplace marginal likelihood.

A Wide ResNet with Fixup is trained by laplace-torch's own `marglik_training`, on this project's
K-FAC as its curvature backend (`laplace_backend`): every five epochs the factors of the whole data
set are accumulated and diagonalised, and the precision of each parameter tensor's prior takes ten
steps up the marginal likelihood. *Fixed* is the same training with all precisions at 1. Weight
decay here is precision / N: the loss is mean cross-entropy + 1/2 Σ weight decay · |parameter|².

By default on scikit-learn's handwritten digits; augmentation moves them by one pixel. `update` is
the time of one such update of the weight decays, of expand and reduce in turns on one model. What
grows with the data set, the accumulation, is also timed for the paper's network.

The paper's size, on a GPU: --paper --data-dir DIR
"""

from experiments.marginal_likelihood.command import PAPER, PAPER_SIZE, SMALL, add_flags, run
from experiments.marginal_likelihood.report import draw, tables

__all__ = ["PAPER", "PAPER_SIZE", "SMALL", "add_flags", "draw", "run", "tables"]
