"""Latent matrices that all documents share: weights of topics, effects of covariates, trends."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvi.models.topics.random_walk import RandomWalk
from pvi.nn import Component

START = 0.1  # standard deviations of posteriors at the beginning


class Weights(Component):
    """An array of latents with an independent normal posterior for each.

    Args:
        shape: of the array.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.loc = nn.Parameter(torch.zeros(self.shape))
        self.raw_scale = nn.Parameter(torch.full(self.shape, math.log(math.expm1(START))))

    @abstractmethod
    def prior(self) -> Any:
        """All dimensions are the event's."""

    def posterior(self) -> Any:
        """The same, as normals."""
        fn = dist.Normal(self.loc, softplus(self.raw_scale), validate_args=False)
        return fn.to_event(len(self.shape))

    def started(self, loc: Tensor) -> "Weights":
        """The same with these means of the posterior."""
        self.loc.data.copy_(loc)
        return self


class NormalWeights(Weights):
    """$N(0, s^2)$ each.

    Args:
        shape: of the array.
        spread: s.
    """

    def __init__(self, shape: Sequence[int], spread: float = 1.0):
        super().__init__(shape)
        self.spread = spread

    def prior(self) -> Any:
        fn = dist.Normal(torch.zeros_like(self.loc), self.spread, validate_args=False)
        return fn.to_event(len(self.shape))


class SparseWeights(Weights):
    """$\\mathrm{Laplace}(0, s)$ each, most near 0.

    Args:
        shape: of the array.
        spread: s.
    """

    def __init__(self, shape: Sequence[int], spread: float = 1.0):
        super().__init__(shape)
        self.spread = spread

    def prior(self) -> Any:
        fn = dist.Laplace(torch.zeros_like(self.loc), self.spread, validate_args=False)
        return fn.to_event(len(self.shape))


class WalkWeights(Weights):
    """A random walk along the first dimension, see `RandomWalk`.

    Args:
        shape: of the array, times first.
        spread, step: standard deviations at the first time and of a step.
    """

    def __init__(self, shape: Sequence[int], spread: float = 1.0, step: float = 0.1):
        super().__init__(shape)
        self.spread, self.step = spread, step

    def prior(self) -> Any:
        return RandomWalk(torch.zeros_like(self.loc), self.spread, self.step)
