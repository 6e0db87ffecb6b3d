"""Families of a document's shares of topics: prior, posterior, and how shares come from a latent.

A family draws a latent z for each document and makes shares $\\theta$ of it that sum to 1.
"""

from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pvi
from pvi.errors import ModelError
from pvi.nn import Component

FLOOR = 1e-4  # of scales and concentrations


class Family(Component):
    """How shares of K topics are distributed; `width` numbers of the encoder make a posterior.

    Attributes:
        real: whether z is in $R^K$ with a normal prior, whose mean covariates may shift.
    """

    topics: int
    width: int
    real: bool = False

    @abstractmethod
    def prior(self, shift: Tensor | None = None) -> Any:
        """$p(z)$: event shape `(K,)`.

        Args:
            shift: of the mean, for real families, `(*batch, K)`.
        """

    @abstractmethod
    def posterior(self, h: Tensor) -> Any:
        """$q(z \\mid x)$ from numbers of the encoder `(B, width)`."""

    @abstractmethod
    def shares(self, z: Tensor) -> Tensor:
        """$\\theta$ `(*batch, K)`."""

    @abstractmethod
    def mean(self, q: Any, noise: Tensor) -> Tensor:
        """$E_q[\\theta]$ `(B, K)`.

        Args:
            q: a posterior (or prior) that this family has made.
            noise: points of the uniform distribution on the cube, `(S, K)`, where there is no
                closed form.
        """

    def besides(self) -> None:
        """What is to be minimised besides, by `pvi.penalty`, outside of the documents' plate."""


class RealFamily(Family):
    """$z \\sim N(m, S)$, $\\theta = \\mathrm{softmax}(z)$, with a diagonal posterior."""

    real = True

    @abstractmethod
    def location(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviations of the prior, `(K,)` each."""

    def prior(self, shift: Tensor | None = None) -> Any:
        loc, scale = self.location()
        loc = loc if shift is None else loc + shift
        return dist.Normal(loc, scale.expand_as(loc), validate_args=False).to_event(1)

    def posterior(self, h: Tensor) -> Any:
        loc, raw = h.chunk(2, -1)
        return dist.Normal(loc, softplus(raw) + FLOOR, validate_args=False).to_event(1)

    def shares(self, z: Tensor) -> Tensor:
        return z.softmax(-1)

    def mean(self, q: Any, noise: Tensor) -> Tensor:
        white = torch.special.ndtri(noise).unsqueeze(-2)
        z = q.base_dist.loc + q.base_dist.scale * white
        return self.shares(z).mean(0)


class LogisticNormal(RealFamily):
    """$z \\sim N(0, s^2 I)$, $\\theta = \\mathrm{softmax}(z)$.

    Args:
        topics: K.
        scale: s.

    Reference:
        Blei and Lafferty (2007); Miao, Grefenstette and Blunsom (2017).
    """

    def __init__(self, topics: int, scale: float = 1.0):
        super().__init__()
        self.topics, self.scale, self.width = topics, scale, 2 * topics
        self.register_buffer("loc", torch.zeros(topics), persistent=False)

    def location(self) -> tuple[Tensor, Tensor]:
        loc: Any = self.loc
        return loc, torch.full_like(loc, self.scale)


class LaplaceDirichlet(RealFamily):
    """A Dirichlet, approximated by Laplace's method in the coordinates of the softmax.

    $$m_k = \\log\\alpha_k - \\frac1K\\sum_i\\log\\alpha_i, \\qquad
      s_k^2 = \\frac1{\\alpha_k}\\Bigl(1 - \\frac2K\\Bigr) + \\frac1{K^2}\\sum_i\\frac1{\\alpha_i}$$

    which is $m = 0$, $s^2 = (1 - 1/K) / \\alpha$ where all are alike. A single topic has the share
    1 for any z; its $s^2$ is $1 / \\alpha$.

    Args:
        topics: K.
        concentration: $\\alpha$.

    Reference:
        Srivastava and Sutton (2017), Autoencoding Variational Inference for Topic Models, eq. 3.
    """

    def __init__(self, topics: int, concentration: float = 1.0):
        super().__init__()
        self.topics, self.concentration, self.width = topics, concentration, 2 * topics
        self.register_buffer("loc", torch.zeros(topics), persistent=False)

    def location(self) -> tuple[Tensor, Tensor]:
        loc: Any = self.loc
        variance = (1.0 - 1.0 / self.topics or 1.0) / self.concentration
        return loc, torch.full_like(loc, variance**0.5)


class Correlated(RealFamily):
    """$z = m + \\mathrm{diag}(s) L \\epsilon$, $\\epsilon \\sim N(0, I)$: correlated topics.

    m, s and the correlations $L L^\\top$ are learned; the latent is $\\epsilon$, so that a diagonal
    posterior of it is a correlated one of z, with an exact KL. The correlations have an LKJ prior,
    whose density is a penalty: they are at the mode of bound and prior together, and the bound
    stays that of the model at these values.

    Args:
        topics: K.
        lkj: concentration of the LKJ prior; 1 is uniform over correlation matrices.

    Reference:
        Blei and Lafferty (2007), A correlated topic model of Science; Lewandowski, Kurowicka and
        Joe (2009).
    """

    def __init__(self, topics: int, lkj: float = 2.0):
        super().__init__()
        if topics < 2:
            raise ModelError(f"correlated topics need n_components >= 2, got {topics}")
        self.topics, self.lkj, self.width = topics, lkj, 2 * topics
        self.loc = torch.nn.Parameter(torch.zeros(topics))
        self.raw_scale = torch.nn.Parameter(torch.full((topics,), 0.5413))  # softplus is 1
        self.raw_correlation = torch.nn.Parameter(torch.zeros(topics * (topics - 1) // 2))

    def location(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.loc), torch.ones_like(self.loc)

    def prior(self, shift: Tensor | None = None) -> Any:
        if shift is None:
            return super().prior()
        rows = torch.linalg.solve_triangular(
            self.factor(), shift.unsqueeze(-1), upper=False
        ).squeeze(-1)
        return super().prior(rows)

    def shares(self, z: Tensor) -> Tensor:
        return (self.loc + z @ self.factor().T).softmax(-1)

    def factor(self) -> Tensor:
        """$\\mathrm{diag}(s) L$ `(K, K)`."""
        scale = softplus(self.raw_scale) + FLOOR
        return scale.unsqueeze(-1) * self.cholesky()

    def cholesky(self) -> Tensor:
        """L, whose rows have length 1."""
        transform = torch.distributions.transforms.CorrCholeskyTransform()
        factor: Any = transform(self.raw_correlation)
        return factor

    def correlation(self) -> Tensor:
        """$L L^\\top$ `(K, K)`."""
        return self.cholesky() @ self.cholesky().T

    def besides(self) -> None:
        prior = dist.LKJCholesky(self.topics, self.lkj, validate_args=False)
        pvi.penalty("correlation", -prior.log_prob(self.cholesky()))


class Dirichlet(Family):
    """$\\theta \\sim \\mathrm{Dirichlet}(\\alpha)$, with a Dirichlet posterior.

    Gradients are those of implicit reparameterisation, the KL is exact.

    Args:
        topics: K.
        concentration: $\\alpha$ of each topic.

    Reference:
        Figurnov, Mohamed and Mnih (2018), Implicit reparameterization gradients; Burkhardt and
        Kramer (2019), Decoupling sparsity and smoothness in the Dirichlet variational autoencoder
        topic model.
    """

    def __init__(self, topics: int, concentration: float = 0.1):
        super().__init__()
        self.topics, self.concentration, self.width = topics, concentration, topics
        self.register_buffer("alpha", torch.full((topics,), float(concentration)), persistent=False)

    def prior(self, shift: Tensor | None = None) -> Any:
        alpha: Any = self.alpha
        return dist.Dirichlet(alpha, validate_args=False)

    def posterior(self, h: Tensor) -> Any:
        return dist.Dirichlet(softplus(h) + FLOOR, validate_args=False)

    def shares(self, z: Tensor) -> Tensor:
        return z

    def mean(self, q: Any, noise: Tensor) -> Tensor:
        return q.mean
