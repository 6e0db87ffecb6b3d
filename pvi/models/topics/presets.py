"""Named models: combinations of parts, with the training of their papers."""

from collections.abc import Sequence
from typing import Any

from pvi.models.topics.topic_model import TopicModel


class ProdLDA(TopicModel):
    """A product of experts under an approximated Dirichlet: coherent topics.

    Args:
        n_components: K.
        concentration: of the Dirichlet.
        dropout: share of the encoder's hidden units that are dropped in training.
        topic_dropout: share of topics that are dropped in training.
        hidden, bayesian_topics, topic_concentration, epochs, batch_size, lr, momentum,
            random_state: as of `TopicModel`.

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
            random_state=random_state,
        )


class LDA(TopicModel):
    """Latent Dirichlet allocation: mixtures of topics under a Dirichlet, by an encoder.

    Args:
        n_components: K.
        concentration: of the Dirichlet, for each topic.
        family: "dirichlet", "gamma", "weibull" or "laplace_dirichlet".
        hidden, dropout, bayesian_topics, topic_concentration, epochs, batch_size, lr, momentum,
            random_state: as of `TopicModel`.

    Reference:
        Blei, Ng and Jordan (2003), Latent Dirichlet Allocation.
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        family: Any = "dirichlet",
        concentration: float = 0.1,
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
            concentration=concentration,
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
