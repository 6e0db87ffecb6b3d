"""Topics for readers: tables, typical documents, groups and periods, pyLDAvis, a page."""

from pvi.models.topics.output.documents import representative_documents
from pvi.models.topics.output.groups import TopicsByGroup, topics_by_label, topics_over_time
from pvi.models.topics.output.ldavis import ldavis
from pvi.models.topics.output.page import TopicReport
from pvi.models.topics.output.words import named_words, top_words_table, topic_shares

__all__ = [
    "TopicReport",
    "TopicsByGroup",
    "ldavis",
    "named_words",
    "representative_documents",
    "top_words_table",
    "topic_shares",
    "topics_by_label",
    "topics_over_time",
]
