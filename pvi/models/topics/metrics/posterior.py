"""What the posteriors of documents say: a bound on held-out evidence, and the KL of each topic."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvi.errors import DataError
from pvi.models.topics.counts import Bag, Batch
from pvi.models.topics.inference import Inference, evaluating
from pvi.progress import progress

ROWS = 256  # documents in a batch


@dataclass(frozen=True)
class HeldOutBound:
    """A bound on the log evidence of documents, nats.

    Attributes:
        documents: of each `(N,)`.
        tokens: in all of them.
        num_samples: importance samples for each.
    """

    documents: np.ndarray = field(repr=False)
    tokens: float
    num_samples: int

    @property
    def mean(self) -> float:
        """Of a document."""
        return float(self.documents.mean())

    @property
    def se(self) -> float:
        """Standard error of the mean over documents."""
        return float(self.documents.std(ddof=1) / len(self.documents) ** 0.5)

    @property
    def perplexity(self) -> float:
        """$\\exp(-\\mathrm{bound} / \\mathrm{tokens})$: an upper bound, on average over draws."""
        return float(np.exp(-self.documents.sum() / self.tokens))

    def __str__(self) -> str:
        return (
            f"{self.mean:.2f} ± {self.se:.2g} nats a document, perplexity at most "
            f"{self.perplexity:.0f} ({self.num_samples} importance samples)"
        )


def heldout_bound(
    model: Any, X: Any, *, num_samples: int = 100, seed: int = 0, **more: Any
) -> HeldOutBound:
    """The importance-weighted bound of whole documents, without the multinomial coefficient.

    $$\\log p(x_d) \\ge \\mathrm{E} \\log \\frac1S \\sum_s
      \\frac{p(x_d \\mid \\theta_s)\\, p(z_s)}{q(z_s \\mid x_d)}, \\qquad z_s \\sim q$$

    Topics are at their posterior means. A perplexity from it is not one of document completion: it
    asks for all words of a document given none, and is not comparable with `dc_perplexity`.

    Args:
        model: fitted, of `pvi.models.topics`.
        X: counts `(N, V)`.
        num_samples: S; the bound rises with it, towards the log evidence.
        seed: of the draws.
        more: what else the model takes of documents.

    Raises:
        DataError: fewer than two documents, or no sample.

    Reference:
        Burda, Grosse and Salakhutdinov (2016).
    """
    if num_samples < 1:
        raise DataError(f"num_samples: expected at least 1, got {num_samples}")
    inference = Inference(model.programs_)
    parts, tokens, weights = [], 0.0, model.programs_.point().detach()
    for number, batch in enumerate(_batches(model, X, more)):
        parts.append(inference.log_evidence(batch, weights, num_samples, seed + number))
        tokens += float(batch["counts"].sum())
    return HeldOutBound(torch.cat(parts).double().numpy(), tokens, num_samples)


def kl_per_topic(model: Any, X: Any, **more: Any) -> np.ndarray:
    """KL of the posterior of each topic's latent from its prior, averaged over documents `(K,)`.

    Of a Dirichlet, it is that of the marginal, a beta distribution. A topic with a KL near 0 is not
    in use: documents say nothing of it.

    Args:
        model: fitted, of `pvi.models.topics`.
        X: counts `(N, V)`; empty documents are left out.
        more: what else the model takes of documents.

    Raises:
        DataError: the posterior has no such KL in closed form, or all documents are empty.
    """
    programs, total, number = model.programs_, 0.0, 0
    inference = Inference(programs)
    for batch in _batches(model, X, more):
        bag = Bag.of(batch["words"], batch["counts"])
        with evaluating(programs):
            q, p = programs.posterior(bag, batch), inference.prior(batch)
            divergence = kl_divergence(_marginals(q), _marginals(p)).expand(len(bag), -1)
        total = total + divergence[bag.filled].double().sum(0)
        number += int(bag.filled.sum())
    if not number:
        raise DataError("X: expected documents with words, got none")
    found: Any = total / number
    return found.numpy()


def _marginals(fn: Any) -> Any:
    """The distribution of each topic's latent, with the topics as the last dimension of a batch."""
    if isinstance(fn, dist.Dirichlet):
        alpha: Tensor = fn.concentration
        return dist.Beta(alpha, alpha.sum(-1, keepdim=True) - alpha, validate_args=False)
    if isinstance(fn, dist.Independent):
        return fn.base_dist
    raise DataError(f"the posterior, {type(fn).__name__}, has no KL for single topics")


def _batches(model: Any, X: Any, more: dict[str, Any]) -> Iterator[Batch]:
    if X.shape[0] < 2:
        raise DataError(f"X: expected at least two documents, got {X.shape[0]}")
    starts = range(0, X.shape[0], ROWS)
    for start in progress(starts, "documents"):
        rows = slice(start, start + ROWS)
        parts = {name: values[rows] for name, values in more.items()}
        yield from model.batches(X[rows], size=ROWS, **parts)
