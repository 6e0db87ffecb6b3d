"""A fitted topic model and documents as an `xarray.DataTree`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvi.models.topics.counts import Batch, Counts
from pvi.models.topics.inference import Inference
from pvi.models.topics.uncertainty import topic_draws
from pvi.posterior.arviz import load


def to_datatree(
    model: Any,
    data: Counts,
    *,
    num_draws: int,
    top_n: int,
    vocabulary: Any,
    importance: int,
    seed: int,
) -> Any:
    """Topics, shares and log likelihoods with dims (chain, draw, ...).

    Args:
        model: the estimator.
        data: documents; their groups are computed when they are read.
        num_draws: S.
        top_n: words of each topic that the export holds.
        vocabulary: the words' names in order.
        importance: draws of each document's latent, for its log likelihood.
        seed: of the draws.
    """
    import xarray

    names, size, topics = np.asarray(vocabulary), len(data), model.n_components
    words = np.unique(np.argsort(-model.components_, axis=1, kind="stable")[:, :top_n])
    weights = _weights(model, num_draws, seed)
    chosen = _chosen(model, words, num_draws, seed)
    documents = _Documents(Inference(model.programs_), data, weights, num_draws, importance, seed)
    from pvi.models.topics.lazy import lazy

    coords: dict[str, Any] = {"chain": [0], "draw": np.arange(num_draws)}
    shares = lazy((1, num_draws, size, topics), 2, documents.shares)
    loglik = lazy((1, num_draws, size), 2, documents.log_likelihood)
    posterior = xarray.Dataset(
        {
            "topic_word": (("chain", "draw", "topic", "word"), chosen[None]),
            "doc_topic": xarray.Variable(("chain", "draw", "document", "topic"), shares),
        },
        coords | {"topic": np.arange(topics), "word": names[words], "document": np.arange(size)},
    )
    likelihood = xarray.Dataset(
        {"words": xarray.Variable(("chain", "draw", "document"), loglik)},
        coords | {"document": np.arange(size)},
    )
    lengths = np.asarray(data.matrix.sum(1)).ravel()
    observed = xarray.Dataset({"length": ("document", lengths)}, {"document": np.arange(size)})
    groups = {"posterior": posterior, "log_likelihood": likelihood, "observed_data": observed}
    return xarray.DataTree.from_dict(groups)


def _weights(model: Any, num_draws: int, seed: int) -> Tensor:
    """Draws of the topics' weights `(S, K, D)`; `(1, K, D)` where they are parameters."""
    programs = model.programs_
    if not programs.bayesian:
        return programs.point().detach().unsqueeze(0)
    q, generator = programs.topics.posterior().base_dist, torch.Generator().manual_seed(seed)
    white = torch.randn((num_draws, *q.loc.shape), generator=generator, dtype=q.loc.dtype)
    return (q.loc + white * q.scale).detach()


def _chosen(model: Any, words: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """$p(w \\mid k)$ of some words `(S, K, words)`."""
    if not model.programs_.bayesian:
        point = model.components_[:, words]
        return np.broadcast_to(point, (num_draws, *point.shape))
    draws = topic_draws(model.programs_, num_draws, seed)
    return np.concatenate([d[..., torch.as_tensor(words)].double().numpy() for d in draws])


@dataclass(frozen=True)
class _Documents:
    """Functions of blocks of documents, whose draws depend on the seed and the block alone."""

    inference: Inference
    data: Counts
    weights: Tensor
    num_draws: int
    importance: int
    seed: int

    def seed_of(self, rows: slice) -> int:
        """Of a block."""
        return int(np.random.SeedSequence([self.seed, rows.start]).generate_state(1)[0])

    def batch(self, rows: slice) -> Batch:
        return self.data.batch(np.arange(rows.start, rows.stop))

    def shares(self, rows: slice) -> np.ndarray:
        """`(1, S, block, K)`."""
        found = self.inference.draws(self.batch(rows), self.num_draws, self.seed_of(rows))
        return found.double().numpy()[None]

    def log_likelihood(self, rows: slice) -> np.ndarray:
        """Of documents, their latents integrated out by importance sampling `(1, S, block)`."""
        batch, seed, evidence = self.batch(rows), self.seed_of(rows), self.inference.log_evidence
        found = torch.stack([evidence(batch, w, self.importance, seed) for w in self.weights])
        return found.expand(self.num_draws, -1).double().numpy()[None]


def as_arviz(tree: Any) -> Any:
    """As `arviz.InferenceData` for arviz 0.x; the tree itself for 1.x."""
    arviz = load()
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData.from_datatree(tree)
    return tree
