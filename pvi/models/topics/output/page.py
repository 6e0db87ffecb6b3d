"""All there is to say of fitted topics: a page, its pictures, and tables as files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pvi.datasets import Corpus, Documents
from pvi.models.topics import metrics
from pvi.models.topics.labels import known_labels
from pvi.models.topics.metrics.checks import as_components, top_word_ids
from pvi.models.topics.output.documents import representative_documents
from pvi.models.topics.output.groups import topics_by_label, topics_over_time
from pvi.models.topics.output.ldavis import ldavis
from pvi.models.topics.output.words import named_words, top_words_table
from pvi.page import Bar, Items, Numbers, Picture, Section, Table, write_page
from pvi.plots import topics as plots

PANELS = 12  # topics that have panels of their own
FEW = 5  # documents whose mean is not worth a point in the course over time
ROWS = 25  # labels, at most, in the heat map: the most frequent
LONG = 160  # letters of a text that are shown
WINDOW = 110  # of C_V (Röder et al. 2015)


class TopicReport:
    """What is found of a fitted model on a corpus; computed once, written by `write`.

    Args:
        model: fitted, with `transform` and `components_`.
        corpus: what it was fitted to, and documents held out.
        top_n: words of each topic in tables.
        more: what `transform` needs besides counts, for training and for held-out documents.
    """

    def __init__(
        self,
        model: Any,
        corpus: Corpus,
        *,
        top_n: int = 10,
        more: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    ):
        self.model, self.corpus, self.more = model, corpus, more
        train = corpus.train
        self.top_n = min(top_n, len(corpus.vocabulary))
        self.beta = as_components(model)
        self.shares = np.asarray(model.transform(train.counts, **more[0]), dtype=float)
        self.collapse = metrics.collapse(model, train.counts, shares=self.shares)
        self.npmi = metrics.npmi(self.beta, train.counts, top_n=self.top_n, name="training")
        self.words = named_words(self.beta, corpus.vocabulary, self.top_n)
        self.order = np.argsort(-self.collapse.share, kind="stable")
        self.names = [f"{k} {words[0]}" for k, words in enumerate(self.words)]

    def write(self, out: Path, title: str, lead: str = "") -> None:
        """Write `index.html`, its pictures, `.csv` tables, shares and arguments of pyLDAvis.

        Args:
            out: a folder, made if it is not there.
            title, lead: of the page.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        sections = list(self.sections())
        for picture in (picture for section in sections for picture in section.pictures):
            picture.save(out)
        write_page(out / "index.html", title, lead or str(self.corpus), sections)
        self.table().to_csv(out / "topics.csv")
        np.save(out / "shares.npy", self.shares)
        arrays = ldavis(
            self.model, self.corpus.train.counts, self.corpus.vocabulary, shares=self.shares
        )
        np.savez_compressed(out / "pyldavis.npz", **arrays)  # type: ignore[arg-type]
        for name, found in self.groups().items():
            found.to_pandas().to_csv(out / f"{name}.csv")

    def sections(self) -> Iterator[Section]:
        """Of the page."""
        yield Section("How good the topics are", [Numbers(self.numbers()), *self.notes()])
        yield Section("Topics", [self._topics(), self._map(), self._words()])
        if self.corpus.train.texts is not None:
            yield Section("Documents with the largest shares", [self._documents()])
        yield from self._groups()
        if hasattr(self.model, "topics_over_time_"):
            yield Section("How topics change", [self._changes()])
        yield Section("Use and overlap", [*self._findings(), *self._pictures_of_use()])

    def numbers(self) -> list[tuple[str, str, str]]:
        """Key numbers: name, value, how it was measured."""
        train, test = self.corpus.train, self.corpus.test
        rows = []
        if len(test) and metrics.split_tokens(test.counts)[1].nnz:
            found = metrics.dc_perplexity(self.model, test.counts, **self.more[1])
            floor = metrics.unigram_perplexity(train.counts, test.counts)
            remark = (
                f"completion of {len(test):,} documents held out; by word counts alone {floor:.0f}"
            )
            rows.append(("perplexity", f"{found:.0f}", remark))
        remark = f"top {self.top_n} words, {len(train):,} training documents, no window"
        rows.append(("NPMI", f"{self.npmi.mean:.3f}", remark))
        if (value := self._c_v(train)) is not None:
            remark = f"top {self.top_n} words, windows of {WINDOW} tokens"
            rows.append(("C_V", f"{value:.3f}", remark))
        top = min(25, self.beta.shape[1])
        diversity = metrics.topic_diversity(self.beta, top_n=top)
        rows.append(("diversity", f"{diversity:.3f}", f"distinct words among the top {top}"))
        overlap = metrics.inverted_rbo(self.beta, top_n=self.top_n)
        rows.append(("inverted RBO", f"{overlap:.3f}", f"top {self.top_n} words, p = 0.9"))
        if (found := self._classification()) is not None:
            remark = (
                f"of labels of {found.num_test:,} documents held out, by logistic regression on "
                f"topics; most frequent label {found.majority:.3f}"
            )
            rows.append(("accuracy", f"{found.accuracy:.3f}", remark))
        active = f"{self.collapse.num_active} of {len(self.beta)}"
        remark = f"sd of the share above {self.collapse.threshold:g}"
        return [*rows, ("active topics", active, remark)]

    def table(self) -> Any:
        """All topics as a pandas table, the largest first."""
        return top_words_table(
            self.beta,
            self.corpus.vocabulary,
            top_n=self.top_n,
            shares=self.shares,
            X=self.corpus.train.counts,
            npmi=self.npmi.topics,
            kl_words=self.collapse.kl_words,
            documents=self.collapse.leads,
        )

    def groups(self) -> dict[str, Any]:
        """Shares by label and over time, where labels and times are known."""
        train, found = self.corpus.train, {}
        if train.labels is not None and known_labels(train.labels).any():
            found["topics_by_label"] = topics_by_label(self.shares, train.labels)
        if train.times is not None and (train.times == train.times).any():  # NaN and NaT aren't
            least = min(FEW, len(train) // 20)
            found["topics_over_time"] = topics_over_time(
                self.shares, train.times, min_documents=least
            )
        return found

    def notes(self) -> list[str]:
        """What the fit says of itself."""
        fit = getattr(self.model, "fit_", None)
        return [] if fit is None else [str(fit), *fit.notes]

    def _classification(self) -> metrics.Classification | None:
        """Where training documents have two labels or more, and some held-out ones have one."""
        train, test = self.corpus.train, self.corpus.test
        if train.labels is None or test.labels is None:
            return None
        known = known_labels(train.labels)
        if len(np.unique(train.labels[known])) < 2 or not known_labels(test.labels).any():
            return None
        asked = self.model.transform(test.counts, **self.more[1])
        return metrics.classification(None, self.shares, train.labels, asked, test.labels)

    def _c_v(self, train: Documents) -> float | None:
        """Where the order of tokens is known, and holds all top words."""
        sequences = [text for text in train.sequences or () if len(text)]
        if not sequences:
            return None
        seen = np.unique(np.concatenate(sequences))
        if not np.isin(top_word_ids(self.beta, self.top_n), seen).all():
            return None
        return metrics.c_v(self.beta, sequences, top_n=self.top_n, window=WINDOW).mean

    def _topics(self) -> Table:
        largest = self.collapse.share.max()
        rows = [
            [
                str(k),
                Bar(float(self.collapse.share[k] / largest)),
                f"{self.collapse.share[k]:.1%}",
                int(self.collapse.leads[k]),
                f"{self.npmi.topics[k]:.2f}",
                f"{self.collapse.kl_words[k]:.2f}",
                ", ".join(self.words[k]),
            ]
            for k in self.order
        ]
        header = ["topic", "share", "", "documents", "NPMI", "KL", "words"]
        caption = (
            "Share of all tokens; documents in which it is the largest topic; coherence; nats from "
            "the words of the corpus, near 0 for a topic that says nothing"
        )
        return Table(header, rows, caption)

    def _map(self) -> Picture:
        made = plots.plot_topic_map(self.beta, self.collapse.share, self.names)
        caption = "Topics close to each other have like words; areas are shares of all tokens"
        return Picture.of(made, "map.png", caption)

    def _words(self) -> Picture:
        shown = self.order[:PANELS]
        weights = np.sort(self.beta[shown], axis=1)[:, ::-1][:, : self.top_n]
        titles = [f"topic {k}, {self.collapse.share[k]:.1%}" for k in shown]
        made = plots.plot_topic_words([self.words[k] for k in shown], weights, titles)
        caption = f"The {len(shown)} largest topics: probabilities of their words"
        return Picture.of(made, "words.png", caption)

    def _documents(self) -> Table:
        train, texts = self.corpus.train, list(self.corpus.train.texts or ())
        lengths = np.asarray(train.counts.sum(1)).ravel()
        least = min(20, int(lengths.max()))
        found = representative_documents(self.shares, n=2, X=train.counts, min_tokens=least)
        rows = [
            [self.names[k], f"{self.shares[row, k]:.0%}", _short(texts[row])]
            for k in self.order
            for row in found[k]
        ]
        return Table(["topic", "share", "document"], rows)

    def _changes(self) -> Table:
        """The words of topics that move, at the first, the middle and the last time."""
        topics, times = self.model.topics_over_time_, self.model.times_
        shown = sorted({0, len(times) // 2, len(times) - 1})
        words = [named_words(topics[t], self.corpus.vocabulary, self.top_n) for t in shown]
        rows = [[self.names[k], *(", ".join(map(str, w[k])) for w in words)] for k in self.order]
        header = ["topic", *(str(times[t]) for t in shown)]
        return Table(header, rows, f"The top {self.top_n} words of each time")

    def _groups(self) -> Iterator[Section]:
        groups = self.groups()
        if (found := groups.get("topics_by_label")) is not None:
            kept = np.sort(np.argsort(-found.counts, kind="stable")[:ROWS])
            labels = [f"{found.groups[g]} ({found.counts[g]})" for g in kept]
            values = found.mean[np.ix_(kept, self.order)]
            columns = [self.names[k] for k in self.order]
            made = plots.plot_topic_heatmap(values, labels, columns)
            caption = "Mean shares of topics in the documents of each label (and how many)"
            if len(kept) < len(found.groups):
                caption += f"; the {len(kept)} most frequent of {len(found.groups)} labels"
            yield Section("By label", [Picture.of(made, "labels.png", caption)])
        if (found := groups.get("topics_over_time")) is not None:
            shown = self.order[:PANELS]
            titles = [self.names[k] for k in shown]
            parts = (found.mean[:, shown], found.se[:, shown], titles)
            made = plots.plot_topics_over_time(found.groups, *parts)
            caption = f"Mean shares of the {len(shown)} largest topics, with two standard errors"
            yield Section("Over time", [Picture.of(made, "times.png", caption)])

    def _findings(self) -> list[Any]:
        found = self.collapse
        lines = [
            f"{self.names[k]} is not in use: its share hardly differs between documents"
            for k in np.flatnonzero(~found.active)
        ]
        lines += [
            f"{self.names[k]} repeats {self.names[found.twin[k]]}: {found.overlap[k]:.0%} of the "
            "top words are the same"
            for k in np.flatnonzero(found.duplicate)
        ]
        return [Items(lines)] if lines else ["All topics are in use, and none repeats another."]

    def _pictures_of_use(self) -> Iterator[Picture]:
        made = plots.plot_topic_similarity(self.beta)
        yield Picture.of(made, "similarity.png", "How alike the words of topics are")
        if (fit := getattr(self.model, "fit_", None)) is not None:
            yield Picture.of(fit.plot(), "bound.png", "The bound in training, nats")


def _short(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= LONG else text[: LONG - 1].rsplit(" ", 1)[0] + " …"
