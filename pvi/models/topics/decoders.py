"""Decoders: from a document's shares of topics to the distribution of its words."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

import pvi
from pvi.models.topics.counts import Bag
from pvi.models.topics.likelihoods import MixtureWords, Words
from pvi.models.topics.normalization import BatchNorm
from pvi.models.topics.weights import NormalWeights, SparseWeights, Weights
from pvi.nn import Component


class Decoder(Component):
    """What K topics are: a matrix of weights, one row for each, and what they say of words.

    Attributes:
        weights: `(K, D)`, what is a latent if topics are Bayesian.
        spread: standard deviation of the weights' prior in that case.
        dense: whether the likelihood needs a batch's counts of all words.
        always_latent: whether the weights are latent in any case.
    """

    weights: Tensor
    spread: float = 1.0
    dense: bool = False
    always_latent: bool = False

    def latent(self) -> Weights:
        """The weights as latents."""
        return NormalWeights(self.weights.shape, self.spread)

    @abstractmethod
    def topics(self, weights: Tensor) -> Tensor:
        """What `words` needs of the weights `(*batch, K, D)`, computed once a batch."""

    @abstractmethod
    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        """The distribution of the words of B documents, and the value that was observed of it.

        Args:
            shares: `(*particles, B, K)`.
            topics: from `topics`.
            bag, counts: the documents, and their counts as a padded batch.
        """

    @abstractmethod
    def components(self, weights: Tensor) -> Tensor:
        """$p(w \\mid k)$ `(*batch, K, V)`."""

    def besides(self, weights: Tensor) -> None:
        """What is to be minimised besides, by `pvi.penalty`, outside of the documents' plate."""


class Mixture(Decoder):
    """$p(w) = \\sum_k \\theta_k \\beta_{kw}$ with $\\beta_k = \\mathrm{softmax}(W_k)$.

    Topics have the prior $\\mathrm{Dirichlet}(\\eta)$. As points they are at the mode of bound and
    prior together, in the coordinates W, where the prior's density is
    $\\prod_w \\beta_{kw}^\\eta$: a penalty, and no part of the bound. As latents they have its
    Laplace approximation in these coordinates.

    Args:
        number, vocabulary: K and V.
        concentration: $\\eta$.

    Reference:
        Blei, Ng and Jordan (2003), Latent Dirichlet Allocation; MacKay (1998), Choice of basis for
        Laplace approximation.
    """

    def __init__(self, number: int, vocabulary: int, concentration: float = 0.1):
        super().__init__()
        self.vocabulary, self.concentration = vocabulary, concentration
        self.number = number
        self.spread = ((1.0 - 1.0 / vocabulary or 1.0) / concentration) ** 0.5
        self.weights = nn.Parameter(0.5 * torch.randn(number, vocabulary))

    def topics(self, weights: Tensor) -> Tensor:
        return weights.softmax(-1)

    components = topics

    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        return MixtureWords(shares, topics, bag, counts.shape[-1]), counts

    def besides(self, weights: Tensor) -> None:
        if weights is self.weights:  # else they are latent, and have a prior
            pvi.penalty("topics", -self.concentration * weights.log_softmax(-1).sum())


class Sparse(Decoder):
    """$\\beta_k \\propto e^{b + W_k}$, deviations from a background b that are mostly near 0.

    The deviations have a Laplace prior: as a penalty, which is no part of the bound, or of latents.

    Args:
        number, vocabulary: K and V.
        sparsity: inverse scale of the Laplace prior.

    Reference:
        Eisenstein, Ahmed and Xing (2011), Sparse additive generative models of text.
    """

    background: Tensor

    def __init__(self, number: int, vocabulary: int, sparsity: float = 1.0):
        super().__init__()
        self.number, self.vocabulary, self.sparsity = number, vocabulary, sparsity
        self.spread = 1.0 / sparsity
        self.register_buffer("background", torch.zeros(vocabulary))
        self.weights = nn.Parameter(0.1 * torch.randn(number, vocabulary))

    def latent(self) -> Weights:
        return SparseWeights(self.weights.shape, self.spread)

    def topics(self, weights: Tensor) -> Tensor:
        return (self.background + weights).softmax(-1)

    components = topics

    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        return MixtureWords(shares, topics, bag, counts.shape[-1]), counts

    def besides(self, weights: Tensor) -> None:
        if weights is self.weights:  # else they are latent, and have a prior
            pvi.penalty("sparsity", self.sparsity * weights.abs().sum())


class Product(Decoder):
    """$p(w) \\propto \\exp(\\mathrm{norm}(\\theta W))_w$, a product of experts.

    In training, shares are dropped out and the logits are normalised over the batch; both are off
    when anything is evaluated, where the model is the one with running statistics.

    Args:
        number, vocabulary: K and V.
        dropout: share of a document's topics that are dropped in training.
        normalize: whether logits are normalised.

    Reference:
        Srivastava and Sutton (2017), Autoencoding Variational Inference for Topic Models.
    """

    dense = True

    def __init__(self, number: int, vocabulary: int, dropout: float = 0.6, normalize: bool = True):
        super().__init__()
        self.number, self.vocabulary = number, vocabulary
        self.dropout, self.normalize = dropout, normalize
        self.drop = nn.Dropout(dropout)
        self.norm = BatchNorm(vocabulary) if normalize else nn.Identity()
        bound = math.sqrt(6.0 / (number + vocabulary))
        self.weights = nn.Parameter(torch.empty(number, vocabulary).uniform_(-bound, bound))

    def topics(self, weights: Tensor) -> Tensor:
        return weights

    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        logits = self.norm(self.drop(shares) @ topics)
        return Words(logits), bag.dense(self.vocabulary)

    def components(self, weights: Tensor) -> Tensor:
        return weights.softmax(-1)
