"""Topic models as estimators of scikit-learn."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils import ClassifierTags, check_random_state

from pvi.engine.traces import preserved_rng
from pvi.errors import DataError
from pvi.models.topics.assembly import assemble
from pvi.models.topics.counts import Counts
from pvi.models.topics.fitted import FittedTopics
from pvi.models.topics.saved import load, save
from pvi.models.topics.seeding import ROWS
from pvi.models.topics.stream import CountStream, streams
from pvi.models.topics.training import Recipe


class TopicModel(FittedTopics):
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
        encoder: what it reads, "words", "embeddings" or "both", or an `Encoder`; or "coordinate",
            no network but the coordinate ascent of LDA.
        heads: "labels" where `y` of `fit` holds classes.
        bayesian_topics: whether topics are latent with a posterior.
        concentration: of the prior of shares; by default the family's.
        topic_concentration: of the Dirichlet prior of topics, for "mixture".
        sparsity: inverse scale of the deviations' Laplace prior, for "sage".
        word_embeddings: positions of words for decoders that have them, `(V, E)`, which then
            stay as they are, or E, for learned ones, which begin at random, or for "ecrtm" at the
            documents' latent semantic analysis.
        step: standard deviation of a step of topics over times, for "dynamic".
        label_weight: of a label's log likelihood; only 1 is a model's.
        hidden: units of the encoder's layers.
        dropout: share of its hidden units that are dropped in training.
        topic_dropout: share of topics that are dropped in training by "product".
        normalize: whether the encoder's numbers, and logits of "product", are normalised.
        epochs, lr, momentum: of the training by Adam, momentum its first coefficient.
        batch_size: documents in a step, but at most a fifth of the corpus, or 20: `fit` on few
            documents would else be a few steps.
        decay: whether the rate falls along a cosine.
        total_documents: of the corpus that `partial_fit` is given in pieces.
        random_state: makes a fit repeatable.

    Attributes:
        components_: $p(w \\mid k)$ `(K, V)`.
        programs_: the model and guide as Pyro programs.
        fit_: the `pvi.Fit` of the last training.
    """

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
        step: float = 0.1,
        label_weight: float = 1.0,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.0,
        topic_dropout: float = 0.0,
        normalize: bool = True,
        epochs: int = 100,
        batch_size: int = 200,
        lr: float = 0.002,
        momentum: float = 0.9,
        decay: bool = True,
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
        self.step = step
        self.label_weight = label_weight
        self.hidden = hidden
        self.dropout = dropout
        self.topic_dropout = topic_dropout
        self.normalize = normalize
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.momentum = momentum
        self.decay = decay
        self.total_documents = total_documents
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, **options: Any) -> Self:
        """Train on documents.

        Args:
            X: counts `(N, V)`, sparse or dense; or a `CountStream`, or a `DataLoader` of one.
            y: labels for a head that wants them, -1 or `None` where unknown.
            options: `embeddings` `(N, E)`, `covariates` `(N, C)` and `times` `(N,)` of documents,
                and options of `pvi.fit` such as objective, validation_data or checkpoint.

        Raises:
            DataError: data don't fit together, or the model lacks some.
        """
        for name in ("optimizer_", "classes_", "times_", "calls_"):
            self.__dict__.pop(name, None)
        streamed = streams(X)
        if streamed is not None:
            return self._fit_stream(X, streamed, options)
        seed = self._seed()
        data, options = self._checked(X, y, options, reset=True)
        self._assemble(data, seed)
        self.fit_ = self._recipe().fit(self.programs_, data, seed, options)
        self.n_documents_ = len(data)
        return self

    def partial_fit(self, X: Any, y: Any = None, *, classes: Any = None, **options: Any) -> Self:
        """One pass of training on some documents of a corpus, going on from the last call.

        Args:
            X, y: as of `fit`.
            classes: all labels there are, at the first call of a model with labels.
            options: as of `fit`.
        """
        first, self.calls_ = not hasattr(self, "programs_"), getattr(self, "calls_", 0) + 1
        seed = self._seed() + self.calls_  # else all calls would have the same noise
        if first and classes is not None:
            self.classes_ = np.unique(classes)
        data, options = self._checked(X, y, options, reset=first)
        if first:
            self._assemble(data, seed)
        if not hasattr(self, "optimizer_"):
            trained = [p for p in self.programs_.parameters() if p.requires_grad]
            self.optimizer_ = self._recipe().optimizer(trained)
        documents = self.total_documents or len(data)
        step = self._recipe().step
        self.fit_ = step(self.programs_, data, documents, self.optimizer_, seed, options)
        self.n_documents_ = documents
        return self

    def fit_transform(self, X: Any, y: Any = None, **options: Any) -> np.ndarray:
        """`fit`, then the shares of the same documents."""
        more = {k: options[k] for k in ("embeddings", "covariates", "times") if k in options}
        return self.fit(X, y, **options).transform(X, **more)

    def _fit_stream(self, X: Any, stream: CountStream, options: dict[str, Any]) -> Self:
        if self.heads or self.decoder == "dynamic":
            raise DataError("labels and times can't be streamed: give fit the whole corpus")
        seed = self._seed()
        self.__dict__.pop("feature_names_in_", None)
        self.n_features_in_ = stream.n_features
        self._assemble(stream.first(ROWS), seed, stream.n_documents)
        loader = stream.loader() if X is stream else X
        self.fit_ = self._recipe().fit(self.programs_, loader, seed, options, stream.n_documents)
        self.n_documents_ = stream.n_documents
        return self

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _recipe(self) -> Recipe:
        return Recipe(self.epochs, self.batch_size, self.lr, self.momentum, self.decay)

    def _assemble(self, data: Counts, seed: int, documents: int | None = None) -> None:
        with preserved_rng():
            torch.manual_seed(seed)
            self.programs_ = assemble(self, data, documents or self.total_documents)

    def save(self, folder: Any) -> None:
        """Write the fitted model to a folder, in the place of what is there; nothing in it is code.

        Args:
            folder: its name.
        """
        self._fitted()
        save(self, folder)

    @classmethod
    def load(cls, folder: Any) -> Self:
        """The model that `save` wrote.

        Args:
            folder: its name.

        Raises:
            CheckpointError: it is the folder of something else.
        """
        kinds = {kind.__name__: kind for kind in (TopicModel, *TopicModel.__subclasses__())}
        ours = {name: kind for name, kind in kinds.items() if kind.__module__.startswith("pvi.")}
        return load(folder, ours, cls)

    def top_words(self, n: int = 10, *, vocabulary: Any = None) -> list[list[Any]]:
        """The n most probable words of each topic, or all where there are fewer.

        Args:
            n: how many, from 1.
            vocabulary: the words' names in order; else their numbers, or the names of columns that
                `fit` was given.
        """
        if n < 1:
            raise DataError(f"n: expected at least 1 word, got {n}")
        names = self._names(vocabulary)
        order = np.argsort(-self.components_, axis=1, kind="stable")[:, :n]
        return [names[row].tolist() for row in order]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.non_deterministic = False
        if "labels" in self.heads:
            tags.classifier_tags = ClassifierTags()
        return tags
