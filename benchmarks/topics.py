"""Topic models beside tomotopy and scikit-learn: quality, labels, all presets, invariance.

    python -m benchmarks.topics --data DIR [--parts quality ...] [--models ...] [--seeds 3]

DIR holds 20ng_prodlda/20ng_prodlda.npz and 20ng_ecrtm5000/20ng_ecrtm5000.npz (20 Newsgroups as
prepared for ProdLDA and for ECRTM). Rows that are not run again stay in the results.

quality: 20ng_prodlda, K = 50. labels: 20ng_ecrtm5000, with a classifier on the topics. presets: all
of them on 20ng_ecrtm5000. reuters: all, with times, on 395 news items of the package `lda`, whose
times are months, K = 15. transform: shares of documents in other batches and orders, twice, and in
a new process.

NPMI: top 10 words, whole documents as windows, corpus named; a pair that never occurs together is
-1. TD25 and TD10: the share of distinct words among the topics' top 25 and 10. dc-ppl: document
completion, each test document's tokens in two halves (seed 0).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, report
from benchmarks.topics_peers import PEERS, SETTINGS, timed_fit
from pvi.datasets import Corpus, corpus
from pvi.models.topics import (
    CTM,
    ETM,
    LDA,
    DynamicETM,
    ProdLDA,
    SupervisedLDA,
    TopicModel,
    metrics,
)

K, FEW = 50, 15
FILES = {"quality": "20ng_prodlda", "labels": "20ng_ecrtm5000", "presets": "20ng_ecrtm5000"}
PARTS = (*FILES, "reuters", "transform")
OURS: dict[str, Callable[..., Any]] = {"ProdLDA": ProdLDA, "LDA": LDA}
PRESETS: dict[str, Callable[..., Any]] = {
    **OURS,
    "LDA, latent topics": lambda **o: LDA(bayesian_topics=True, **o),
    "ETM": ETM,
    "CTM (LSA embeddings)": CTM,
    "SupervisedLDA": SupervisedLDA,
    "correlated": lambda **o: TopicModel(family="correlated", **o),
    "SAGE": lambda **o: TopicModel(decoder="sage", **o),
    "ECRTM": lambda **o: TopicModel(family="laplace_dirichlet", decoder="ecrtm", **o),
}
HEADER = (
    "model",
    "seed",
    "epochs",
    "CPU s",
    "dc-ppl",
    "NPMI train",
    "NPMI test",
    "TD25",
    "TD10",
    "inverted RBO",
    "active",
    "accuracy",
)
LSA = 100  # dimensions of the documents' embeddings for CTM


def fits(options: Any, part: str) -> None:
    """One corpus: one row a model and seed."""
    if part == "reuters":
        found, models = _dated(corpus("reuters")), {**PRESETS, "DynamicETM": DynamicETM}
    else:
        found = corpus(options.data / FILES[part] / f"{FILES[part]}.npz")
        models = PRESETS if part == "presets" else {**OURS, **PEERS}
    rows = {(r["model"], r["seed"]): [r[c] for c in HEADER] for r in _old(options.results, part)}
    for model, seed in _wanted(options, ["unigram", *models]):
        try:
            row = _row(model, models.get(model), seed, found, options.epochs)
        except ImportError as error:
            print(f"{model}: left out, {error}", flush=True)
            continue
        rows[model, seed] = row
        print(dict(zip(HEADER, row, strict=True)), flush=True)
        more = {"settings of peers": SETTINGS, f"corpus of {part}": str(found)}
        report("topics", HEADER, list(rows.values()), options.results, key=part, more=more)


def _wanted(options: Any, models: list[str]) -> list[tuple[str, int]]:
    chosen = [m for m in models if not options.models or m in options.models]
    seeds = range(options.seed, options.seed + options.seeds)
    return [(m, seed) for seed in seeds for m in chosen if m != "unigram" or seed == seeds[0]]


def _row(model: str, kind: Any, seed: int, found: Corpus, epochs: int | None) -> list[Any]:
    train, test = found.train, found.test
    if model == "unigram":
        empty = [None] * (len(HEADER) - 5)
        value = metrics.unigram_perplexity(train.counts, test.counts)
        return [model, seed, None, None, value, *empty]
    made = kind(n_components=FEW if found.name == "reuters" else K, random_state=seed)
    if epochs is not None and model not in PEERS:
        made.set_params(epochs=epochs)
    more: Any = _embeddings(found) if model.startswith("CTM") else ({}, {})
    if model == "DynamicETM":
        more = tuple({"times": part.times} for part in (train, test))
    labels = train.labels if model == "SupervisedLDA" else None
    cpu = timed_fit(made, train.counts, labels, **more[0])
    return [model, seed, getattr(made, "epochs", None), cpu, *measures(made, found, more)]


def measures(model: Any, found: Corpus, more: Any) -> list[Any]:
    """Everything after the seconds, in the order of HEADER."""
    train, test = found.train, found.test
    shares = model.transform(train.counts, **more[0])
    accuracy = None
    if train.labels is not None:
        asked = model.transform(test.counts, **more[1])
        accuracy = metrics.classification(None, shares, train.labels, asked, test.labels).accuracy
    return [
        metrics.dc_perplexity(model, test.counts, **more[1]),
        metrics.npmi(model, train.counts).mean,
        metrics.npmi(model, test.counts).mean,
        metrics.topic_diversity(model, top_n=25),
        metrics.topic_diversity(model, top_n=10),
        metrics.inverted_rbo(model),
        metrics.collapse(model, train.counts, shares=shares).num_active,
        accuracy,
    ]


def _dated(found: Corpus) -> Corpus:
    """Documents that have a time, which becomes its month; held-out ones of months in training."""
    halves: list[Any] = []
    for part in (found.train, found.test):
        times: Any = part.times
        kept = part.take(np.flatnonzero(~np.isnat(times)))
        halves.append(replace(kept, times=times[~np.isnat(times)].astype("datetime64[M]")))
    halves[1] = halves[1].take(np.flatnonzero(np.isin(halves[1].times, halves[0].times)))
    return Corpus(*halves, found.vocabulary, found.name)


def _embeddings(found: Corpus) -> tuple[dict[str, Any], dict[str, Any]]:
    """Latent semantic analysis of the training documents, in place of a language model's."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.pipeline import make_pipeline

    lsa = make_pipeline(TfidfTransformer(sublinear_tf=True), TruncatedSVD(LSA, random_state=0))
    train = lsa.fit_transform(found.train.counts)
    return {"embeddings": train}, {"embeddings": lsa.transform(found.test.counts)}


NEW = """
import sys
import numpy as np
from pvi.datasets import corpus
from pvi.models.topics import TopicModel
folder, data, out = sys.argv[1:]
np.save(out, TopicModel.load(folder).transform(corpus(data).test.counts))
"""


def transform(options: Any) -> None:
    """Largest differences between shares of the same documents, asked in other ways."""
    path = options.data / "20ng_prodlda" / "20ng_prodlda.npz"
    found = corpus(path)
    counts = found.test.counts
    order = np.random.default_rng(options.seed).permutation(counts.shape[0])
    rows = []
    for name, kind in OURS.items():
        made = kind(n_components=K, epochs=options.epochs or 2, random_state=options.seed)
        made.fit(found.train.counts)
        whole = made.transform(counts)
        with tempfile.TemporaryDirectory() as folder:
            made.save(f"{folder}/model")
            words = [sys.executable, "-c", NEW, f"{folder}/model", str(path), f"{folder}/x.npy"]
            subprocess.run(words, check=True)
            loaded = np.load(f"{folder}/x.npy")
        ways = {
            "again": made.transform(counts),
            "in batches of 7": np.vstack(
                [made.transform(counts[i : i + 7]) for i in range(0, 700, 7)]
            ),
            "one by one": np.vstack([made.transform(counts[i]) for i in range(100)]),
            "in another order": made.transform(counts[order])[np.argsort(order)],
            "loaded in a new process": loaded,
        }
        apart = {w: float(np.abs(x - whole[: len(x)]).max()) for w, x in ways.items()}
        rows += [[name, way, len(ways[way]), value] for way, value in apart.items()]
    header = ("model", "asked", "documents", "largest difference")
    report("topics", header, rows, options.results, key="transform")


def _old(results: Path, key: str) -> list[dict[str, Any]]:
    path = results / "topics.json"
    return json.loads(path.read_text()).get(key, []) if path.exists() else []


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    options.add_argument("--models", nargs="*", default=[], help="by default all")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, help="by default those of the presets")
    chosen = options.parse_args()
    for part in chosen.parts:
        if part == "transform":
            transform(chosen)
        else:
            fits(chosen, part)


if __name__ == "__main__":
    main()
