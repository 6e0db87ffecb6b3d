"""Coherences of pvi beside gensim's, on the same topics, texts and windows.

    python -m benchmarks.topics_coherence --data DIR

DIR as for benchmarks.topics; gensim must be installed. Texts are the first 3,000 documents, the
tokens of each shuffled, since that corpus does not keep their order; gensim leaves out texts
without any top word, so they are left out here. When a window moves on, gensim takes the word at
its edge for gone, also where the window still holds it elsewhere, so the two agree on texts
without repetitions only. In NPMI, gensim gives a pair that never occurs together a value by adding
1e-12, and pvi -1: topics without such a pair are compared.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.common import parser, report
from benchmarks.topics_peers import sklearn_lda
from pvi.datasets import corpus
from pvi.models.topics import metrics
from pvi.models.topics.metrics.cooccurrence import cooccurrence

DOCUMENTS, TOPICS, TOP_N = 3000, 20, 10
HEADER = (
    "measure",
    "texts",
    "window",
    "topics",
    "pvi",
    "gensim",
    "largest difference",
    "s pvi",
    "s gensim",
)


def texts_of(counts: Any, ids: np.ndarray, seed: int, *, once: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = (counts[i] for i in range(counts.shape[0]))
    whole = [
        rng.permutation(row.indices if once else np.repeat(row.indices, row.data.astype(int)))
        for row in rows
    ]
    return [text for text in whole if np.isin(text, ids).any()]


def main() -> None:
    options = parser(__doc__, data=True).parse_args()
    found = corpus(options.data / "20ng_prodlda" / "20ng_prodlda.npz")
    counts = found.train.counts[:DOCUMENTS]
    fitted = sklearn_lda(TOPICS, options.seed).set_params(max_iter=5, batch_size=256).fit(counts)
    ids = np.argsort(-fitted.components_, axis=1, kind="stable")[:, :TOP_N]
    rows = []
    for once in (True, False):
        texts = texts_of(counts, ids, options.seed, once=once)
        kind = "each word once" if once else "with repetitions"
        rows += [[name, kind, *row] for name, *row in compared(ids, texts, counts)]
    report("topics_coherence", HEADER, rows, options.results)


def compared(ids: np.ndarray, texts: list[np.ndarray], counts: Any) -> Iterator[list[Any]]:
    runs: list[Any] = [
        ("C_V", 110, "c_v", lambda: metrics.c_v(ids, texts, window=110)),
        ("C_V", 20, "c_v", lambda: metrics.c_v(ids, texts, window=20)),
        ("NPMI", 20, "c_npmi", lambda: metrics.npmi(ids, texts, window=20)),
        (
            "U_Mass",
            None,
            "u_mass",
            lambda: metrics.u_mass(ids, documents(texts, counts), epsilon=1e-12),
        ),
    ]
    for measure, window, name, ours in runs:
        start = time.process_time()
        values = ours().topics
        middle = time.process_time()
        theirs = gensim_values(name, ids, texts, window)
        seconds = (middle - start, time.process_time() - middle)
        kept = np.full(len(ids), True)
        if measure == "NPMI":
            joint = cooccurrence(ids, texts, window)
            kept = np.array([(joint.of(row)[1] > 0).all() for row in ids])
        apart = float(np.abs(values - theirs)[kept].max(initial=0.0))
        means = (float(values[kept].mean()), float(theirs[kept].mean()))
        yield [measure, window, int(kept.sum()), *means, apart, *seconds]


def documents(texts: list[np.ndarray], counts: Any) -> np.ndarray:
    return np.array([np.bincount(text, minlength=counts.shape[1]) for text in texts])


def gensim_values(measure: str, ids: np.ndarray, texts: list[np.ndarray], window: Any) -> Any:
    from gensim.corpora import Dictionary
    from gensim.models import CoherenceModel

    words = [[str(w) for w in text] for text in texts]
    dictionary = Dictionary(words)
    made = CoherenceModel(
        topics=[[str(w) for w in row] for row in ids],
        texts=words,
        corpus=[dictionary.doc2bow(text) for text in words] if measure == "u_mass" else None,
        dictionary=dictionary,
        window_size=window,
        coherence=measure,
        topn=ids.shape[1],
        processes=1,
    )
    return np.array(made.get_coherence_per_topic())


if __name__ == "__main__":
    main()
