"""What fitted topic models answer."""

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from pvi.errors import DataError
from pvi.models.topics.counts import Batch, Counts
from pvi.models.topics.export import as_arviz, to_datatree
from pvi.models.topics.inference import Inference
from pvi.models.topics.inputs import checked_counts, columns
from pvi.models.topics.programs import TopicPrograms
from pvi.models.topics.uncertainty import (
    credible_intervals,
    top_word_probability,
    topic_draws,
)

ROWS = 512  # documents in a batch of what is not trained


def _has_labels(model: Any) -> bool:
    return "labels" in model.heads


class FittedTopics(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The methods of a topic model that need a fit.

    Attributes:
        programs_: the model and guide as Pyro programs.
        n_features_in_: V, number of words.
    """

    programs_: TopicPrograms
    n_features_in_: int
    classes_: np.ndarray
    n_components: int

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

        Draws go by the document's place: among others it differs by the error of num_samples draws.

        Args:
            X, y, more: as in `fit`.
            num_samples: draws for each document.
        """
        if num_samples < 1:
            raise DataError(f"num_samples: expected at least 1, got {num_samples}")
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

    def log_likelihood(self, X: Any, *, given: Any = None, **more: Any) -> np.ndarray:
        """$\\sum_w n_{dw} \\log p(w \\mid E_q[\\theta_d])$ of each document, nats `(N,)`.

        Args:
            X, more: as of `transform`.
            given: counts from which the shares come, by default X.
        """
        inference = Inference(self._fitted())
        data = self._data(X, None, more)
        source = data if given is None else self._data(given, None, more)
        pairs = zip(data.batches(ROWS), source.batches(ROWS), strict=True)
        parts = [inference.log_likelihood(inference.shares(s), batch) for batch, s in pairs]
        return torch.cat(parts).double().numpy()

    def perplexity(self, X: Any, *, seed: int = 0, **more: Any) -> float:
        """Perplexity of half of each document's tokens given the other half.

        Args:
            X: whole counts `(N, V)`.
            seed: of the split.
            more: as of `transform`.

        Raises:
            DataError: no document has two tokens.
        """
        from pvi.models.topics.metrics import dc_perplexity

        return dc_perplexity(self, X, seed=seed, **more)

    @available_if(_has_labels)
    def predict_proba(self, X: Any, **more: Any) -> np.ndarray:
        """$p(y \\mid E_q[\\theta])$ `(N, classes)`, in the order of `classes_`.

        Args:
            X, more: as of `transform`.
        """
        inference, data = Inference(self._fitted()), self._data(X, None, more)
        parts = [inference.predictions(batch, "labels") for batch in data.batches(ROWS)]
        return torch.cat(parts).double().numpy()

    @available_if(_has_labels)
    def predict(self, X: Any, **more: Any) -> np.ndarray:
        """The most probable label of each document `(N,)`.

        Args:
            X, more: as of `transform`.
        """
        found = self.predict_proba(X, **more).argmax(1)
        return self.classes_[found]

    def topic_draws(self, num_draws: int = 100, *, seed: int = 0) -> np.ndarray:
        """Draws of $p(w \\mid k)$ from the posterior of latent topics `(S, K, V)`."""
        draws = topic_draws(self._fitted(), num_draws, seed)
        return np.concatenate([d.double().numpy() for d in draws])

    def credible_intervals(
        self, level: float = 0.9, *, num_draws: int = 400, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of central intervals of $p(w \\mid k)$, `(K, V)` each.

        Args:
            level: their probability, between 0 and 1.
            num_draws: from the posterior of latent topics.
        """
        ends = credible_intervals(self._fitted(), level, num_draws, seed)
        return ends[0].double().numpy(), ends[1].double().numpy()

    def top_word_probability(
        self, n: int = 10, *, num_draws: int = 400, seed: int = 0
    ) -> np.ndarray:
        """$P(w$ is among the n most probable words of topic $k)$ `(K, V)`.

        Args:
            n: from 1 to V.
            num_draws: from the posterior of latent topics.
        """
        return top_word_probability(self._fitted(), n, num_draws, seed).double().numpy()

    def to_datatree(
        self,
        X: Any,
        y: Any = None,
        *,
        num_draws: int = 100,
        top_n: int = 20,
        vocabulary: Any = None,
        importance: int = 16,
        seed: int = 0,
        **more: Any,
    ) -> Any:
        """Topics and documents as an `xarray.DataTree`.

        Groups: `posterior` with `topic_word`, the top words of topics, and `doc_topic`, which is
        computed when it is read; `log_likelihood` with `words`, that of each document with its
        latent integrated out; `observed_data` with lengths. Topics that are points, not latent, are
        the same in all draws.

        Args:
            X, y, more: as in `fit`.
            num_draws: S.
            top_n: words of each topic.
            vocabulary: the words' names in order.
            importance: draws of a document's latent for its log likelihood.
        """
        given = {"num_draws": num_draws, "importance": importance, "top_n": top_n}
        for name, value in given.items():
            if value < 1:
                raise DataError(f"{name}: expected at least 1, got {value}")
        names = self._names(vocabulary)
        options = {"num_draws": num_draws, "top_n": top_n, "importance": importance, "seed": seed}
        return to_datatree(self, self._data(X, y, more), vocabulary=names, **options)

    def to_arviz(self, X: Any, y: Any = None, **options: Any) -> Any:
        """`to_datatree` in the form that the installed arviz takes.

        Args:
            X, y, options: as of `to_datatree`.
        """
        return as_arviz(self.to_datatree(X, y, **options))

    def _names(self, vocabulary: Any) -> np.ndarray:
        """Words in order.

        Raises:
            DataError: they are not as many as the model's.
        """
        from pvi.models.topics.metrics.checks import as_words

        self._fitted()
        if vocabulary is None:
            vocabulary = getattr(self, "feature_names_in_", np.arange(self.n_features_in_))
        names = as_words(vocabulary)
        if len(names) != self.n_features_in_:
            raise DataError(
                f"vocabulary has {len(names)} words, but the model was fitted to "
                f"{self.n_features_in_}"
            )
        return names

    def _fitted(self) -> TopicPrograms:
        check_is_fitted(self, "programs_")
        return self.programs_

    def _data(self, X: Any, y: Any, more: dict[str, Any]) -> Counts:
        self._fitted()
        data, rest = self._checked(X, y, more, reset=False)
        if rest:
            raise DataError(f"{type(self).__name__} takes no argument {next(iter(rest))!r} here")
        return data

    def _checked(
        self, X: Any, y: Any, options: dict[str, Any], *, reset: bool
    ) -> tuple[Counts, dict[str, Any]]:
        """Data, and the options that are none."""
        matrix = checked_counts(self, X, reset=reset)
        found, rest = columns(self, matrix, y, options, reset=reset)
        return Counts(matrix, found), rest
