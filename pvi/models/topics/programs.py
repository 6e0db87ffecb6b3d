"""A topic model and its guide as Pyro programs of a batch of documents."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Dirichlet
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pvi.models.topics.coordinate import CoordinateAscent
from pvi.models.topics.counts import Bag
from pvi.models.topics.decoders import Decoder
from pvi.models.topics.encoders import Encoder
from pvi.models.topics.families import Family
from pvi.models.topics.heads import Head
from pvi.models.topics.likelihoods import topic_rows
from pvi.models.topics.weights import NormalWeights, WalkWeights, Weights
from pvi.nn import Component

PLATE = "documents"
Take = Callable[[str, Weights], Tensor]
STEP = 0.1  # standard deviation of a step of the trend


class TopicPrograms(Component):
    """$z_d \\sim p(z)$, $w_{di} \\sim p(w \\mid \\theta(z_d))$; $q(z_d \\mid x_d)$ by a network.

    $$\\mathcal L = \\sum_d E_q\\Bigl[\\sum_w n_{dw} \\log p(w \\mid \\theta_d)\\Bigr]
      - \\mathrm{KL}(q(z_d \\mid x_d) \\| p(z_d))$$

    A document without words has z and labels masked out: it says nothing, and its shares are the
    prior's.

    Args:
        family, encoder, decoder: parts of one number of topics.
        heads: what else is observed of a document, given its shares.
        covariates: how many there are; they shift the prior's mean by a latent matrix.
        times: how many there are; the prior's mean takes a random walk over them.
        bayesian: whether the topics' weights are latent, with a normal posterior for each.
    """

    def __init__(
        self,
        family: Family,
        encoder: Encoder | CoordinateAscent,
        decoder: Decoder,
        heads: Sequence[Head] = (),
        *,
        covariates: int = 0,
        times: int = 0,
        bayesian: bool = False,
    ):
        super().__init__()
        self.family, self.encoder, self.decoder = family, encoder, decoder
        self.heads = nn.ModuleList(heads)
        self.covariates, self.times = covariates, times
        self.bayesian = bayesian = bayesian or decoder.always_latent
        if covariates:
            self.effects = NormalWeights((covariates, family.topics))
        if times:
            self.trend = WalkWeights((times, family.topics), step=STEP)
        if bayesian:
            self.topics = decoder.latent().started(decoder.weights.detach())
            decoder.weights.requires_grad_(False)

    def model(self, words: Tensor, counts: Tensor, **more: Tensor) -> None:
        """The model of a batch.

        Args:
            words, counts: `(B, L)`, padded with counts of 0.
            more: `embeddings`, `covariates` and what the heads observe.
        """
        self.registered()
        bag = Bag.of(words, counts)
        filled: Any = bag.filled
        weights = self.weights()
        topics = self.decoder.topics(weights)
        shift = self.shift(more, sampled)
        self.family.besides()
        self.decoder.besides(weights)
        with pyro.plate(PLATE, len(counts)):
            with poutine.mask(mask=filled):
                z = pyro.sample("z", self.family.prior(shift))
            shares = self.family.shares(z)
            fn, value = self.decoder.words(shares, topics, bag, counts, **more)
            pyro.sample("words", fn, obs=value)
            with poutine.mask(mask=filled):
                for head in self.heads:
                    head(shares, more)

    def guide(self, words: Tensor, counts: Tensor, **more: Tensor) -> None:
        """The guide of a batch.

        Args:
            words, counts, more: as of `model`.
        """
        self.registered()
        bag = Bag.of(words, counts)
        filled: Any = bag.filled
        if self.bayesian:
            pyro.sample("topics", self.topics.posterior())
        if self.covariates:
            pyro.sample("effects", self.effects.posterior())
        if self.times:
            pyro.sample("trend", self.trend.posterior())
        with pyro.plate(PLATE, len(counts)), poutine.mask(mask=filled):
            pyro.sample("z", self.posterior(bag, more))

    def weights(self) -> Tensor:
        """Of the topics: a latent, or parameters."""
        if self.bayesian:
            return single(pyro.sample("topics", self.topics.prior()), len(self.topics.shape))
        return self.decoder.weights

    def point(self) -> Tensor:
        """The topics' weights, at their posterior means where they are latent."""
        return self.topics.loc if self.bayesian else self.decoder.weights

    def drawn(self) -> Tensor:
        """The topics' weights, a draw from their posterior where they are latent."""
        return self.topics.posterior().sample() if self.bayesian else self.decoder.weights

    def shift(self, batch: Mapping[str, Tensor], take: Take) -> Tensor | None:
        """Of the prior's mean `(*particles, B, K)`; `None` where nothing shifts it.

        Args:
            batch: arguments of the programs.
            take: from a name and its latents to values of them.
        """
        found: Tensor | None = None
        if self.covariates:
            found = batch["covariates"] @ single(take("effects", self.effects), 2)
        if self.times:
            trend = single(take("trend", self.trend), 2).index_select(-2, batch["times"])
            found = trend if found is None else found + trend
        return found

    def posterior(self, bag: Bag, batch: Mapping[str, Tensor]) -> Any:
        """$q(z \\mid x)$ of each document."""
        if isinstance(self.encoder, CoordinateAscent):
            topics = self.decoder.topics(self.point()).detach()
            rows = topic_rows(topics, bag, batch.get("times"))
            return Dirichlet(self.encoder(bag, rows), validate_args=False)
        besides = [batch["covariates"]] if self.covariates else []
        if self.times:
            besides.append(one_hot(batch["times"], self.times).to(bag.counts))
        known = torch.cat(besides, -1) if besides else None
        return self.family.posterior(self.encoder(bag, batch.get("embeddings"), known))

    def registered(self) -> None:
        """Tell Pyro of the parameters; to be called in both programs."""
        with warnings.catch_warnings():  # of Pyro's, on parameters that are frozen on purpose
            warnings.filterwarnings("ignore", ".*requires_grad=False")
            pyro.module("topic_model", self)


def sampled(name: str, weights: Weights) -> Tensor:
    """A latent of the model."""
    return pyro.sample(name, weights.prior())


def mean(name: str, weights: Weights) -> Tensor:
    """The posterior's mean."""
    return weights.loc


def drawn(name: str, weights: Weights) -> Tensor:
    """A draw from the posterior."""
    return weights.posterior().sample()


def single(value: Tensor, dims: int) -> Tensor:
    """An array of so many dimensions without the one that particles leave for the documents."""
    return value.squeeze(-1 - dims) if value.dim() > dims else value
