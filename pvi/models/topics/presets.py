"""Named models: combinations of parts, with the training of their papers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pvi.models.topics.topic_model import TopicModel


class ProdLDA(TopicModel):
    """A product of experts under an approximated Dirichlet: coherent topics.

    Args:
        n_components: K.
        concentration: of the Dirichlet.
        dropout: share of the encoder's hidden units that are dropped in training.
        topic_dropout: share of topics that are dropped in training.
        others: as of `TopicModel`.

    Reference:
        Srivastava and Sutton (2017), Autoencoding Variational Inference for Topic Models.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        concentration: float = 1.0,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.6,
        topic_dropout: float = 0.6,
        bayesian_topics: bool = False,
        epochs: int = 200,
        batch_size: int = 200,
        lr: float = 0.002,
        momentum: float = 0.99,
        random_state: Any = None,
    ):
        super().__init__(
            n_components,
            family="laplace_dirichlet",
            decoder="product",
            concentration=concentration,
            hidden=hidden,
            dropout=dropout,
            topic_dropout=topic_dropout,
            bayesian_topics=bayesian_topics,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            decay=False,
            random_state=random_state,
        )


class LDA(TopicModel):
    """Latent Dirichlet allocation: mixtures of topics under a Dirichlet.

    Shares have Dirichlet posteriors: by coordinate ascent, or by a network with `encoder="words"`,
    which is faster and less exact.

    Args:
        n_components: K.
        concentration: of the Dirichlet, for each topic.
        family: "dirichlet"; with an encoder also "gamma", "weibull" or "laplace_dirichlet".
        encoder: "coordinate" or "words".
        others: as of `TopicModel`.

    Reference:
        Blei, Ng and Jordan (2003), Latent Dirichlet Allocation.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        family: Any = "dirichlet",
        encoder: Any = "coordinate",
        concentration: float = 0.1,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.0,
        bayesian_topics: bool = False,
        topic_concentration: float = 0.1,
        epochs: int = 20,
        batch_size: int = 200,
        lr: float = 0.02,
        momentum: float = 0.9,
        total_documents: int | None = None,
        random_state: Any = None,
    ):
        super().__init__(
            n_components,
            family=family,
            encoder=encoder,
            concentration=concentration,
            hidden=hidden,
            dropout=dropout,
            bayesian_topics=bayesian_topics,
            topic_concentration=topic_concentration,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            total_documents=total_documents,
            random_state=random_state,
        )


class ETM(TopicModel):
    """Topics and words as points of one space: $\\beta_k = \\mathrm{softmax}(\\rho\\alpha_k)$.

    Args:
        n_components: K.
        word_embeddings: `(V, E)`, or E, for a space that is learned.
        hidden, dropout, bayesian_topics, epochs, batch_size, lr, momentum, random_state: as of
            `TopicModel`.

    Reference:
        Dieng, Ruiz and Blei (2020), Topic modeling in embedding spaces.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        word_embeddings: Any = 100,
        hidden: Sequence[int] = (200, 200),
        dropout: float = 0.0,
        bayesian_topics: bool = False,
        epochs: int = 100,
        batch_size: int = 200,
        lr: float = 0.005,
        momentum: float = 0.9,
        random_state: Any = None,
    ):
        super().__init__(
            n_components,
            decoder="etm",
            word_embeddings=word_embeddings,
            hidden=hidden,
            dropout=dropout,
            bayesian_topics=bayesian_topics,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            random_state=random_state,
        )


class CTM(TopicModel):
    """ProdLDA that reads embeddings of documents, alone or with their words.

    `fit` and `transform` need `embeddings=`, `(N, E)` from any language model. Read alone, they
    give shares to documents in languages that the vocabulary does not have.

    Args:
        n_components: K.
        encoder: "both" (combined) or "embeddings" (zero-shot).
        others: as of `ProdLDA`.

    Reference:
        Bianchi, Terragni and Hovy (2021), Pre-training is a hot topic; Bianchi et al. (2021),
        Cross-lingual contextualized topic models with zero-shot learning.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        encoder: Any = "both",
        concentration: float = 1.0,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.2,
        topic_dropout: float = 0.2,
        bayesian_topics: bool = False,
        epochs: int = 100,
        batch_size: int = 64,
        lr: float = 0.002,
        momentum: float = 0.99,
        random_state: Any = None,
    ):
        super().__init__(
            n_components,
            family="laplace_dirichlet",
            decoder="product",
            encoder=encoder,
            concentration=concentration,
            hidden=hidden,
            dropout=dropout,
            topic_dropout=topic_dropout,
            bayesian_topics=bayesian_topics,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            decay=False,
            random_state=random_state,
        )


class SupervisedLDA(TopicModel):
    """Topics of words and labels: $y \\sim \\mathrm{Categorical}(\\mathrm{softmax}(V\\theta + c))$.

    `fit(X, y)` takes labels, -1 or `None` where unknown; `predict` and `predict_proba` give them.

    Args:
        n_components: K.
        family, concentration: as of `LDA`.
        label_weight: of a label's log likelihood; other than 1, bounds are of no model.
        others: as of `TopicModel`.

    Reference:
        McAuliffe and Blei (2007), Supervised topic models.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        family: Any = "dirichlet",
        concentration: float = 0.1,
        label_weight: float = 1.0,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.0,
        bayesian_topics: bool = False,
        topic_concentration: float = 0.1,
        epochs: int = 100,
        batch_size: int = 200,
        lr: float = 0.005,
        momentum: float = 0.9,
        random_state: Any = None,
    ):
        super().__init__(
            n_components,
            family=family,
            heads=("labels",),
            concentration=concentration,
            label_weight=label_weight,
            hidden=hidden,
            dropout=dropout,
            bayesian_topics=bayesian_topics,
            topic_concentration=topic_concentration,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            random_state=random_state,
        )


class DynamicETM(TopicModel):
    """Topics that move through a space of words, by random walks over times.

    `fit` and `transform` need `times=`, one for each document. `topics_over_time_` is
    $p(w \\mid k, t)$ `(T, K, V)`, `components_` its mean over times, `times_` the times.

    Args:
        n_components: K.
        word_embeddings: as of `ETM`.
        step: standard deviation of a topic's step, in each dimension.
        hidden, dropout, epochs, batch_size, lr, momentum, random_state: as of `TopicModel`.

    Reference:
        Dieng, Ruiz and Blei (2019), The dynamic embedded topic model.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        word_embeddings: Any = 100,
        step: float = 0.1,
        hidden: Sequence[int] = (200, 200),
        dropout: float = 0.0,
        epochs: int = 100,
        batch_size: int = 200,
        lr: float = 0.005,
        momentum: float = 0.9,
        random_state: Any = None,
    ):
        super().__init__(
            n_components,
            decoder="dynamic",
            word_embeddings=word_embeddings,
            step=step,
            hidden=hidden,
            dropout=dropout,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            random_state=random_state,
        )

    @property
    def topics_over_time_(self) -> np.ndarray:
        """$p(w \\mid k, t)$ `(T, K, V)`, at the topics' posterior means."""
        programs = self._fitted()
        with torch.no_grad():
            return programs.decoder.topics(programs.point()).double().numpy()
