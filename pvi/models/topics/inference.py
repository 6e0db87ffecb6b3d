"""What is asked of fitted programs: shares, likelihoods and bounds of documents."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.quasirandom import SobolEngine

from pvi.engine.traces import preserved_rng
from pvi.models.topics.counts import Bag, Batch
from pvi.models.topics.programs import TopicPrograms, drawn, mean

POINTS = 64  # of the cube, for means of shares


class Inference:
    """Functions of batches, in evaluation mode, without gradients and by fixed random numbers.

    Args:
        programs: fitted.
    """

    def __init__(self, programs: TopicPrograms):
        self.programs = programs

    @cached_property
    def noise(self) -> Tensor:
        """Points of the uniform distribution on the cube `(POINTS, K)`, always the same."""
        engine = SobolEngine(self.programs.family.topics, scramble=True, seed=0)
        points = engine.draw(POINTS, dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)
        return points.to(torch.get_default_dtype())

    def shares(self, batch: Batch) -> Tensor:
        """$E_q[\\theta]$ `(B, K)`; the prior's for documents of which nothing is known."""
        programs, family = self.programs, self.programs.family
        bag = Bag.of(batch["words"], batch["counts"])
        with evaluating(programs):
            found = family.mean(programs.posterior(bag, batch), self.noise)
            if programs.encoder.reads != "words" or bool(bag.filled.all()):
                return found
            prior = family.mean(self.prior(batch), self.noise)
            return torch.where(bag.filled.unsqueeze(-1), found, prior)

    def log_likelihood(self, shares: Tensor, batch: Batch) -> Tensor:
        """$\\log p(x \\mid \\theta)$ of each document `(B,)`, at the topics' posterior means."""
        programs = self.programs
        with evaluating(programs):
            weights = programs.point()
            bag = Bag.of(batch["words"], batch["counts"])
            return self._words(shares.to(weights), weights, batch, bag)

    def bound(self, batch: Batch, num_samples: int) -> Tensor:
        """$E_q[\\log p(x, y \\mid z)] - \\mathrm{KL}(q(z) \\| p(z))$ of each document `(B,)`.

        Where topics are latent, it is the mean over their posterior, without its KL.
        """
        programs, total = self.programs, torch.zeros(len(batch["counts"]))
        bag = Bag.of(batch["words"], batch["counts"])
        with evaluating(programs):
            q = programs.posterior(bag, batch)
            for number in range(num_samples):
                torch.manual_seed(number)
                z, weights = q.sample(), programs.drawn()
                p = programs.family.prior(programs.shift(batch, drawn))
                shares = programs.family.shares(z)
                observed = self._observed(shares, weights, batch, bag)
                total += observed - bag.filled * _divergence(q, p, z)
        return total / num_samples

    def draws(self, batch: Batch, num_draws: int, seed: int) -> Tensor:
        """Draws of $\\theta$ from the posterior `(S, B, K)`; the prior's as in `shares`."""
        programs = self.programs
        bag = Bag.of(batch["words"], batch["counts"])
        with evaluating(programs):
            torch.manual_seed(seed)
            q, p = programs.posterior(bag, batch), self.prior(batch)
            found = programs.family.shares(q.sample((num_draws,)))
            if programs.encoder.reads != "words" or bool(bag.filled.all()):
                return found
            other = programs.family.shares(p.expand(q.batch_shape).sample((num_draws,)))
            return torch.where(bag.filled.unsqueeze(-1), found, other)

    def log_evidence(self, batch: Batch, weights: Tensor, num_samples: int, seed: int) -> Tensor:
        """$\\log\\frac1K\\sum_k p(x, z_k) / q(z_k)$ of each document, given topics `(B,)`.

        Args:
            weights: of the topics.
            num_samples: K.
        """
        programs, log_w = self.programs, []
        bag = Bag.of(batch["words"], batch["counts"])
        with evaluating(programs):
            torch.manual_seed(seed)
            q, p = programs.posterior(bag, batch), self.prior(batch)
            for _ in range(num_samples):
                z = q.sample()
                value = self._observed(programs.family.shares(z), weights, batch, bag)
                log_w.append(value + bag.filled * (p.log_prob(z) - q.log_prob(z)))
        return torch.logsumexp(torch.stack(log_w), 0) - math.log(num_samples)

    def predictions(self, batch: Batch, name: str) -> Tensor:
        """A head's predictions at the posterior means of shares."""
        heads: Any = self.programs.heads
        head = next(h for h in heads if h.name == name)
        shares = self.shares(batch)
        with evaluating(self.programs):
            return head.predictions(shares.to(self.programs.point()))

    def prior(self, batch: Batch) -> Any:
        """$p(z)$ of each document, at the posterior means of what shifts it."""
        return self.programs.family.prior(self.programs.shift(batch, mean))

    def _observed(self, shares: Tensor, weights: Tensor, batch: Batch, bag: Bag) -> Tensor:
        heads: Any = self.programs.heads
        told = sum(head.log_prob(shares, batch) for head in heads)
        return self._words(shares, weights, batch, bag) + bag.filled * told

    def _words(self, shares: Tensor, weights: Tensor, batch: Batch, bag: Bag) -> Tensor:
        decoder = self.programs.decoder
        topics = decoder.topics(weights)
        more = {k: v for k, v in batch.items() if k not in ("words", "counts")}
        fn, value = decoder.words(shares, topics, bag, batch["counts"], **more)
        return fn.log_prob(value)


def _divergence(q: Any, p: Any, z: Tensor) -> Tensor:
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(z) - p.log_prob(z)


@contextmanager
def evaluating(programs: TopicPrograms) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, the caller's random state kept."""
    training = programs.training
    programs.eval()
    try:
        with torch.no_grad(), preserved_rng():
            yield
    finally:
        programs.train(training)
