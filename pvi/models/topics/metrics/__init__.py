"""How good topics are: held-out likelihood, coherence, diversity, collapse, use for labels.

Each takes a fitted model of any library with `components_` (and where documents matter,
`transform`), or the arrays themselves.
"""

from pvi.models.topics.metrics.classification import Classification, classification
from pvi.models.topics.metrics.coherence import Coherence, c_v, npmi, u_mass
from pvi.models.topics.metrics.collapse import Collapse, collapse
from pvi.models.topics.metrics.diversity import inverted_rbo, topic_diversity
from pvi.models.topics.metrics.heldout import (
    dc_perplexity,
    mixture_log_likelihood,
    split_tokens,
    unigram_perplexity,
)
from pvi.models.topics.metrics.posterior import HeldOutBound, heldout_bound, kl_per_topic

__all__ = [
    "Classification",
    "Coherence",
    "Collapse",
    "HeldOutBound",
    "c_v",
    "classification",
    "collapse",
    "dc_perplexity",
    "heldout_bound",
    "inverted_rbo",
    "kl_per_topic",
    "mixture_log_likelihood",
    "npmi",
    "split_tokens",
    "topic_diversity",
    "u_mass",
    "unigram_perplexity",
]
