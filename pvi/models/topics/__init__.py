"""Topic models: estimators of scikit-learn, whose models and guides are Pyro programs."""

from pvi.models.topics.presets import LDA, ProdLDA
from pvi.models.topics.topic_model import TopicModel

__all__ = ["LDA", "ProdLDA", "TopicModel"]
