"""Guides that follow the model: one family a file, one interface."""

from pvi.guides.amortized import Amortized
from pvi.guides.delta import Delta
from pvi.guides.flow import Flow
from pvi.guides.full_rank import FullRank
from pvi.guides.group import Group
from pvi.guides.guide import Guide
from pvi.guides.init import init_to, init_to_module, prior_median
from pvi.guides.laplace import Laplace
from pvi.guides.low_rank import LowRank
from pvi.guides.matrix_normal import MatrixNormal
from pvi.guides.mean_field import MeanField
from pvi.guides.mixture import Mixture
from pvi.guides.structured import Structured

__all__ = [
    "Amortized",
    "Delta",
    "Flow",
    "FullRank",
    "Group",
    "Guide",
    "Laplace",
    "LowRank",
    "MatrixNormal",
    "MeanField",
    "Mixture",
    "Structured",
    "init_to",
    "init_to_module",
    "prior_median",
]
