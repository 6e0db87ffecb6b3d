"""Topics of 395 news items, which the package `lda` brings along: fit, search, page, pyLDAvis.

python examples/topics_reuters.py [--topics 15] [--epochs 20] [--out topics_reuters]

`pip install lda` first. The folder gets a page, `index.html`; the items' topics by country and over
time are there as tables too.
"""

import argparse
from pathlib import Path

from pvi.datasets import corpus
from pvi.models.topics import LDA, metrics
from pvi.models.topics.output import TopicReport, representative_documents
from pvi.models.topics.search import search_topics

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--topics", type=int, default=15)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--search", type=int, nargs="*", default=[5, 15, 30])
parser.add_argument("--out", type=Path, default=Path("topics_reuters"))
options = parser.parse_args()

news = corpus("reuters")
print(news)
settings = {"epochs": options.epochs, "random_state": 0}
model = LDA(options.topics, **settings).fit(news.train.counts)

print(metrics.npmi(model, news.train.counts, name="the training documents"))
completed = metrics.dc_perplexity(model, news.test.counts)
floor = metrics.unigram_perplexity(news.train.counts, news.test.counts)
print(f"perplexity of held-out documents, completed: {completed:.0f} (unigrams: {floor:.0f})")

report = TopicReport(model, news)
report.write(options.out, "Reuters, 1996-97")
shares = report.shares
titles = news.train.texts or []
best = representative_documents(shares, n=1, X=news.train.counts)[:, 0]
for k, words in enumerate(model.top_words(6, vocabulary=news.vocabulary)):
    print(f"{k:2d} {', '.join(words)}\n   {titles[best[k]]}")

if options.search:
    found = search_topics(LDA(**settings), news.train.counts, news.test.counts, options.search)
    print(found)
    found.plot().savefig(options.out / "search.png")
