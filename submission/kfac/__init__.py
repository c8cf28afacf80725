"""K-FAC-expand and K-FAC-reduce for any PyTorch model.

Source: Eschenhagen, Immer, Turner, Schneider, Hennig: "Kronecker-Factored Approximate Curvature
for Modern Neural Network Architectures", NeurIPS 2023, arXiv 2311.00636. Needs torch only.
"""

from .blocks.public import Curvature, DiagonalCurvature, KroneckerFactors, UnitwiseCurvature
from .config import KFACConfig
from .fisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .fisher.own_gradients import OwnGradients
from .functional import curvature, kronecker_factors
from .operations.sharing import Positions, RaggedBatch, Segments, SharingError
from .optimizer import KFAC
from .preconditioner import Preconditioner
from .state import KFACError

__all__ = [
    "KFAC",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "DiagonalCurvature",
    "Gaussian",
    "KFACConfig",
    "KFACError",
    "KroneckerFactors",
    "Likelihood",
    "OwnGradients",
    "Positions",
    "Preconditioner",
    "RaggedBatch",
    "Segments",
    "SharingError",
    "UnitwiseCurvature",
    "curvature",
    "kronecker_factors",
]
