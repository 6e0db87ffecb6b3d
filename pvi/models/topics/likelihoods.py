"""The likelihood of a document's words, without the multinomial coefficient.

$$\\log p(x) = \\sum_w n_w \\log p_w$$

is the density of the words in their order. The coefficient $n! / \\prod_w n_w!$ of a multinomial
counts the orders; it does not depend on the model, but would be part of every bound and perplexity.
"""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pvi.models.topics.counts import Bag

COUNTS = constraints.independent(constraints.nonnegative, 1)


def topic_rows(topics: Tensor, bag: Bag, times: Tensor | None = None) -> Tensor:
    """$\\beta$ of each word of a bag `(*particles, n, K)`.

    Args:
        topics, bag, times: as of `MixtureWords`.
    """
    by_word, words = topics.transpose(-1, -2), bag.words
    if times is not None:
        words = words + times[bag.documents] * by_word.shape[-2]
        by_word = by_word.flatten(-3, -2)
    return by_word.index_select(-2, words)


class MixtureWords(TorchDistribution):
    """Words of documents that are mixtures of topics: $p_w = \\sum_k \\theta_k \\beta_{kw}$.

    Only the words that occur are looked up: the cost does not grow with the vocabulary.

    Args:
        shares: $\\theta$ `(*particles, B, K)`.
        topics: $\\beta$ `(*particles, K, V)`, or for each of T times `(*particles, T, K, V)`.
        bag: the documents' words. Values are their counts as a padded batch `(B, L)`, which the bag
            was made of.
        width: L.
        times: of each document `(B,)`, where topics have times.
    """

    has_rsample = False

    def __init__(
        self, shares: Tensor, topics: Tensor, bag: Bag, width: int, times: Tensor | None = None
    ):
        self.shares, self.topics, self.bag, self.times = shares, topics, bag, times
        super().__init__(shares.shape[:-1], torch.Size([width]), validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> Any:
        return COUNTS

    def expand(self, batch_shape: _size, _instance: Any = None) -> "MixtureWords":
        shares = self.shares.expand(*batch_shape, self.shares.shape[-1])
        width = self.event_shape[0]
        return MixtureWords(shares, self.topics, self.bag, width, self.times)

    def log_prob(self, value: Tensor) -> Tensor:
        bag = self.bag
        shares = self.shares.index_select(-2, bag.documents)
        p = (shares * topic_rows(self.topics, bag, self.times)).sum(-1)
        tiny = torch.finfo(p.dtype).tiny
        return bag.summed(bag.counts * p.clamp(min=tiny).log())

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Not defined: values are counts of the words that a document is known to have."""
        raise NotImplementedError(
            "counts of given words can't be drawn; draw words from shares @ topics"
        )


class Words(TorchDistribution):
    """Words of documents by the logits of the whole vocabulary: $p_w \\propto e^{h_w}$.

    Args:
        logits: h `(*particles, B, V)`. Values are counts of all words `(B, V)`.
    """

    has_rsample = False

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> Any:
        return COUNTS

    def expand(self, batch_shape: _size, _instance: Any = None) -> "Words":
        return Words(self.logits.expand(*batch_shape, *self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return (value * self.logits.log_softmax(-1)).sum(-1)

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Not defined: how long a document is, is not modelled."""
        raise NotImplementedError(
            "a document's length is not modelled; draw words from softmax(logits)"
        )
