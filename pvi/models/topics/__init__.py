"""Topic models: estimators of scikit-learn, whose models and guides are Pyro programs."""

from pvi.models.topics.presets import CTM, ETM, LDA, DynamicETM, ProdLDA, SupervisedLDA
from pvi.models.topics.stream import CountStream
from pvi.models.topics.topic_model import TopicModel

__all__ = [
    "CTM",
    "ETM",
    "LDA",
    "CountStream",
    "DynamicETM",
    "ProdLDA",
    "SupervisedLDA",
    "TopicModel",
]
