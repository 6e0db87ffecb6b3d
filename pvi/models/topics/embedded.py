"""Decoders whose topics and words are points of one space."""

from typing import Any

import torch
from torch import Tensor, nn

import pvi
from pvi.models.topics.counts import Bag
from pvi.models.topics.decoders import Decoder
from pvi.models.topics.likelihoods import MixtureWords, Words
from pvi.models.topics.normalization import BatchNorm
from pvi.models.topics.transport import transport_cost
from pvi.models.topics.weights import WalkWeights, Weights


class WordSpace(nn.Module):
    """Positions of V words, given or learned: `(V, E)`.

    Args:
        vocabulary, size: V and E.
        learned: whether they are parameters.
    """

    def __init__(self, vocabulary: int, size: int, learned: bool):
        super().__init__()
        start = torch.randn(vocabulary, size) * size**-0.5
        self.positions = nn.Parameter(start, requires_grad=learned)


class Embedded(Decoder):
    """$\\beta_k = \\mathrm{softmax}(\\rho \\alpha_k)$, words $\\rho$, topics $\\alpha$ in a space.

    Args:
        number, vocabulary, size: K, V and the space's dimension E.
        learned: whether positions of words are parameters; else they are given, see `place`.

    Reference:
        Dieng, Ruiz and Blei (2020), Topic modeling in embedding spaces.
    """

    def __init__(self, number: int, vocabulary: int, size: int = 100, learned: bool = True):
        super().__init__()
        self.number, self.vocabulary, self.size, self.learned = number, vocabulary, size, learned
        self.space = WordSpace(vocabulary, size, learned)
        self.weights = nn.Parameter(torch.randn(number, size))

    def topics(self, weights: Tensor) -> Tensor:
        return (weights @ self.space.positions.T).softmax(-1)

    components = topics

    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        return MixtureWords(shares, topics, bag, counts.shape[-1]), counts


class Dynamic(Decoder):
    """$\\beta_{kt} = \\mathrm{softmax}(\\rho \\alpha_{kt})$, $\\alpha_k$ a random walk over times.

    Args:
        number, vocabulary, size, learned: as of `Embedded`.
        times: T.
        step: standard deviation of a step of $\\alpha$.

    Reference:
        Dieng, Ruiz and Blei (2019), The dynamic embedded topic model.
    """

    always_latent = True

    def __init__(
        self,
        number: int,
        vocabulary: int,
        times: int,
        size: int = 100,
        learned: bool = True,
        step: float = 0.1,
    ):
        super().__init__()
        self.number, self.vocabulary, self.size, self.learned = number, vocabulary, size, learned
        self.times, self.step = times, step
        self.space = WordSpace(vocabulary, size, learned)
        start = torch.randn(number, size).expand(times, number, size)
        self.weights = nn.Parameter(start.clone())

    def latent(self) -> Weights:
        return WalkWeights(self.weights.shape, 1.0, self.step)

    def topics(self, weights: Tensor) -> Tensor:
        """`(*batch, T, K, V)`."""
        return (weights @ self.space.positions.T).softmax(-1)

    def components(self, weights: Tensor) -> Tensor:
        """The mean over times."""
        return self.topics(weights).mean(-3)

    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        return MixtureWords(shares, topics, bag, counts.shape[-1], more["times"]), counts


class Clustered(Decoder):
    """A product of experts whose topics are clusters of words.

    $$p(w) \\propto \\exp \\mathrm{norm}(\\theta\\beta)_w, \\qquad
      \\beta_{kw} = \\mathrm{softmax}_k(-|\\rho_w - \\alpha_k|^2 / \\tau)$$

    Each topic's position is the centre of a cluster of words by a penalty, the cost of an optimal
    transport of words to topics, so that topics can't be alike. It is no part of the bound.

    Args:
        number, vocabulary, size, learned: as of `Embedded`.
        documents: N of the corpus, by which the penalty is multiplied, as bounds are sums over it.
        weight: of the penalty of a document, $\\lambda$.
        temperature: $\\tau$.

    Reference:
        Wu, Dong, Nguyen and Luu (2023), Effective neural topic modeling with embedding clustering
        regularization, eqs. 4 to 7.
    """

    dense = True

    def __init__(
        self,
        number: int,
        vocabulary: int,
        documents: int,
        size: int = 100,
        learned: bool = True,
        weight: float = 100.0,
        temperature: float = 0.2,
        normalize: bool = True,
    ):
        super().__init__()
        self.number, self.vocabulary, self.size, self.learned = number, vocabulary, size, learned
        self.documents, self.weight, self.temperature = documents, weight, temperature
        self.normalize = normalize
        self.space = WordSpace(vocabulary, size, learned)
        # logits are at most 1 and vary little: a larger eps would silence all but a few topics
        self.norm = BatchNorm(vocabulary, eps=1e-5) if normalize else nn.Identity()
        self.weights = nn.Parameter(torch.randn(number, size) * size**-0.5)

    def topics(self, weights: Tensor) -> Tensor:
        return (-self.distances(weights) / self.temperature).softmax(-2)

    def components(self, weights: Tensor) -> Tensor:
        """Each topic's row, to sum to 1."""
        rows = self.topics(weights)
        return rows / rows.sum(-1, keepdim=True)

    def distances(self, weights: Tensor) -> Tensor:
        """Squared, of topics and words `(*batch, K, V)`."""
        return torch.cdist(weights, self.space.positions).square()

    def words(
        self, shares: Tensor, topics: Tensor, bag: Bag, counts: Tensor, **more: Tensor
    ) -> Any:
        return Words(self.norm(shares @ topics)), bag.dense(self.vocabulary)

    def besides(self, weights: Tensor) -> None:
        cost = transport_cost(self.distances(weights))
        pvi.penalty("clusters", self.documents * self.weight * cost)


def place(decoder: Any, positions: Tensor) -> None:
    """Give a decoder the positions of words `(V, E)`."""
    decoder.space.positions.data.copy_(positions)
