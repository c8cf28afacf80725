"""K-FAC-expand and K-FAC-reduce for any PyTorch model.

Source: Eschenhagen, Immer, Turner, Schneider, Hennig: "Kronecker-Factored Approximate Curvature
for Modern Neural Network Architectures", NeurIPS 2023, arXiv 2311.00636. Needs torch only.
"""

from .config import KFACConfig
from .curvature import Curvature, DiagonalCurvature, KroneckerFactors, UnitwiseCurvature
from .eigenvalue_correction import EigenvalueCorrectedFactors
from .failures import KFACError
from .functional import curvature, kronecker_factors
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .preconditioner import KFAC
from .sharing import Positions, RaggedBatch, Segments, SharingError

__all__ = [
    "KFAC",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "DiagonalCurvature",
    "EigenvalueCorrectedFactors",
    "Gaussian",
    "KFACConfig",
    "KFACError",
    "KroneckerFactors",
    "Likelihood",
    "Positions",
    "RaggedBatch",
    "Segments",
    "SharingError",
    "UnitwiseCurvature",
    "curvature",
    "kronecker_factors",
]
