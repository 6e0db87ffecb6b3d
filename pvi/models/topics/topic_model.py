"""Topic models as estimators of scikit-learn."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from pvi.engine.traces import preserved_rng
from pvi.errors import DataError
from pvi.models.topics.assembly import assemble
from pvi.models.topics.counts import Batch, Counts
from pvi.models.topics.inference import Inference
from pvi.models.topics.inputs import checked_counts, columns
from pvi.models.topics.programs import TopicPrograms
from pvi.models.topics.training import Recipe

ROWS = 512  # documents in a batch of what is not trained


class TopicModel(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A topic model composed of a family of shares, a decoder, an encoder and heads.

    $$z_d \\sim p(z), \\quad \\theta_d = \\theta(z_d), \\quad
      \\log p(x_d \\mid \\theta_d) = \\sum_w n_{dw} \\log p(w \\mid \\theta_d)$$

    with $q(z_d \\mid x_d)$ by a network. Counts are scipy's CSR matrices from end to end; dense
    arrays are made sparse. The shares of a document never depend on its batch.

    Args:
        n_components: K, number of topics.
        family: "logistic_normal", "laplace_dirichlet", "correlated", "dirichlet", "gamma" or
            "weibull", or one of `pvi.models.topics.families`.
        decoder: "mixture", "product", "etm", "sage", "ecrtm" or "dynamic", or a `Decoder`.
        encoder: what it reads, "words", "embeddings" or "both", or an `Encoder`.
        heads: "labels" where `y` of `fit` holds classes.
        bayesian_topics: whether topics are latent with a posterior.
        concentration: of the prior of shares; by default the family's.
        topic_concentration: of the prior of topics, where they are latent.
        sparsity: inverse scale of the deviations' Laplace prior, for "sage".
        word_embeddings: positions of words for decoders that have them, `(V, E)`, which then
            stay as they are, or E, for learned ones.
        label_weight: of a label's log likelihood; only 1 is a model's.
        hidden: units of the encoder's layers.
        dropout: share of its hidden units that are dropped in training.
        topic_dropout: share of topics that are dropped in training by "product".
        normalize: whether the encoder's numbers, and logits of "product", are normalised.
        epochs, batch_size, lr, momentum: of the training by Adam, momentum its first coefficient.
        total_documents: of the corpus that `partial_fit` is given in pieces.
        random_state: makes a fit repeatable.

    Attributes:
        components_: $p(w \\mid k)$ `(K, V)`.
        programs_: the model and guide as Pyro programs.
        fit_: the `pvi.Fit` of the last training.
    """

    n_features_in_: int

    def __init__(
        self,
        n_components: int = 20,
        *,
        family: Any = "logistic_normal",
        decoder: Any = "mixture",
        encoder: Any = "words",
        heads: Sequence[Any] = (),
        bayesian_topics: bool = False,
        concentration: float | None = None,
        topic_concentration: float = 0.1,
        sparsity: float = 1.0,
        word_embeddings: Any = 100,
        label_weight: float = 1.0,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.0,
        topic_dropout: float = 0.0,
        normalize: bool = True,
        epochs: int = 100,
        batch_size: int = 200,
        lr: float = 0.002,
        momentum: float = 0.9,
        total_documents: int | None = None,
        random_state: Any = None,
    ):
        self.n_components = n_components
        self.family = family
        self.decoder = decoder
        self.encoder = encoder
        self.heads = heads
        self.bayesian_topics = bayesian_topics
        self.concentration = concentration
        self.topic_concentration = topic_concentration
        self.sparsity = sparsity
        self.word_embeddings = word_embeddings
        self.label_weight = label_weight
        self.hidden = hidden
        self.dropout = dropout
        self.topic_dropout = topic_dropout
        self.normalize = normalize
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.momentum = momentum
        self.total_documents = total_documents
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, **options: Any) -> Self:
        """Train on documents.

        Args:
            X: counts `(N, V)`, sparse or dense.
            y: labels for a head that wants them, -1 or `None` where unknown.
            options: `embeddings` `(N, E)`, `covariates` `(N, C)` and `times` `(N,)` of documents,
                and options of `pvi.fit` such as objective, validation_data or checkpoint.

        Raises:
            DataError: data don't fit together, or the model lacks some.
        """
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        matrix = checked_counts(self, X, reset=True)
        more, options = columns(self, matrix, y, options, reset=True)
        with preserved_rng():
            torch.manual_seed(seed)
            self.programs_ = assemble(self, matrix, more)
        recipe = Recipe(self.epochs, self.batch_size, self.lr, self.momentum)
        data = Counts(matrix, more)
        self.fit_ = recipe.fit(self.programs_, data, seed, options)
        self.n_documents_ = matrix.shape[0]
        return self

    @property
    def _n_features_out(self) -> int:
        return self.programs_.family.topics

    @property
    def model(self) -> Any:
        """The model, a Pyro program of a batch from `batches`."""
        return self._fitted().model

    @property
    def guide(self) -> Any:
        """The guide, a Pyro program of a batch from `batches`."""
        return self._fitted().guide

    @property
    def components_(self) -> np.ndarray:
        """$p(w \\mid k)$ `(K, V)`, at the topics' posterior means where they are latent."""
        programs = self._fitted()
        with torch.no_grad():
            found = programs.decoder.components(programs.point())
        return found.double().numpy()

    def transform(self, X: Any, **more: Any) -> np.ndarray:
        """Posterior means of shares of topics `(N, K)`; the prior's for documents without words.

        Args:
            X: counts `(N, V)`.
            more: `embeddings` and `covariates`, as in `fit`.

        Raises:
            DataError: the model needs some that are not given.
        """
        data = self._data(X, None, more)
        inference = Inference(self._fitted())
        parts = [inference.shares(batch) for batch in data.batches(ROWS)]
        return torch.cat(parts).numpy().astype(data.matrix.dtype)

    def fit_transform(self, X: Any, y: Any = None, **options: Any) -> np.ndarray:
        """`fit`, then the shares of the same documents."""
        more = {k: options[k] for k in ("embeddings", "covariates", "times") if k in options}
        return self.fit(X, y, **options).transform(X, **more)

    def batches(self, X: Any, y: Any = None, *, size: int = ROWS, **more: Any) -> list[Batch]:
        """Data as keyword arguments of `model` and `guide`, some documents at a time.

        Args:
            X, y, more: as in `fit`.
            size: documents in a batch.
        """
        return list(self._data(X, y, more).batches(size))

    def score_samples(
        self, X: Any, y: Any = None, *, num_samples: int = 32, **more: Any
    ) -> np.ndarray:
        """The bound of each document, nats `(N,)`, with the same draws in each call.

        Args:
            X, y, more: as in `fit`.
            num_samples: draws for each document.
        """
        inference = Inference(self._fitted())
        data = self._data(X, y, more)
        parts = [inference.bound(batch, num_samples) for batch in data.batches(ROWS)]
        return torch.cat(parts).double().numpy()

    def score(self, X: Any, y: Any = None, **more: Any) -> float:
        """Mean bound of a document, nats.

        Args:
            X, y, more: as in `fit`.
        """
        return float(self.score_samples(X, y, **more).mean())

    def log_likelihood(self, shares: Any, X: Any, **more: Any) -> np.ndarray:
        """$\\sum_w n_{dw} \\log p(w \\mid \\theta_d)$ of each document, nats `(N,)`.

        Args:
            shares: $\\theta$ `(N, K)`, as of `transform`.
            X, more: as in `fit`.
        """
        inference = Inference(self._fitted())
        data, theta = self._data(X, None, more), torch.as_tensor(np.asarray(shares))
        pairs = zip(theta.split(ROWS), data.batches(ROWS), strict=True)
        found = [inference.log_likelihood(part, batch) for part, batch in pairs]
        return torch.cat(found).double().numpy()

    def top_words(self, n: int = 10, *, vocabulary: Any = None) -> list[list[Any]]:
        """The n most probable words of each topic.

        Args:
            n: how many.
            vocabulary: the words' names in order; else their numbers, or the names of columns that
                `fit` was given.
        """
        if vocabulary is None:
            vocabulary = getattr(self, "feature_names_in_", np.arange(self.n_features_in_))
        names = np.asarray(vocabulary)
        if len(names) != self.n_features_in_:
            raise DataError(
                f"vocabulary has {len(names)} words, but the model was fitted to "
                f"{self.n_features_in_}"
            )
        order = np.argsort(-self.components_, axis=1, kind="stable")[:, :n]
        return [names[row].tolist() for row in order]

    def _fitted(self) -> TopicPrograms:
        check_is_fitted(self, "programs_")
        return self.programs_

    def _data(self, X: Any, y: Any, more: dict[str, Any]) -> Counts:
        self._fitted()
        matrix = checked_counts(self, X, reset=False)
        found, rest = columns(self, matrix, y, dict(more), reset=False)
        if rest:
            raise DataError(f"unknown argument {next(iter(rest))!r}")
        return Counts(matrix, found)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.non_deterministic = False
        return tags
