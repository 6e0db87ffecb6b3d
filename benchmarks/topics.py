"""Topic models beside tomotopy and scikit-learn: quality, invariance, size, all presets.

    python -m benchmarks.topics --data DIR [--parts quality ...] [--models ...] [--seeds 3]

DIR holds 20ng_prodlda/20ng_prodlda.npz and 20ng_ecrtm5000/20ng_ecrtm5000.npz (20 Newsgroups as
prepared for ProdLDA and for ECRTM). Rows that are not run again stay in the results.

NPMI: top 10 words, whole documents as windows, corpus named; a pair that never occurs together is
-1. TD25 and TD10: the share of distinct words among the topics' top 25 and 10. dc-ppl: document
completion, each test document's tokens in two halves (seed 0).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import parser, report
from benchmarks.topics_peers import PEERS, SETTINGS, timed_fit
from pvi.datasets import Corpus, corpus
from pvi.models.topics import LDA, ProdLDA, metrics

K = 50
CORPORA = ("20ng_prodlda", "20ng_ecrtm5000")
OURS: dict[str, Callable[..., Any]] = {"ProdLDA": ProdLDA, "LDA": LDA}
HEADER = (
    "model",
    "seed",
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


def quality(options: Any, name: str) -> None:
    """One corpus: ours and peers, one row a model and seed."""
    found = corpus(options.data / name / f"{name}.npz")
    key, rows = f"quality {name}", {}
    for row in _old(options.results, key):
        rows[row["model"], row["seed"]] = [row[column] for column in HEADER]
    for model, seed in _wanted(options, [*OURS, *PEERS, "unigram"]):
        try:
            row = _row(model, seed, found)
        except ImportError as error:
            print(f"{model}: left out, {error}", flush=True)
            continue
        rows[model, seed] = row
        print(dict(zip(HEADER, row, strict=True)), flush=True)
        more = {"settings of peers": SETTINGS, f"corpus {name}": str(found)}
        report("topics", HEADER, list(rows.values()), options.results, key=key, more=more)


def _wanted(options: Any, models: list[str]) -> list[tuple[str, int]]:
    chosen = [m for m in models if not options.models or m in options.models]
    last = options.seed + options.seeds
    return [
        (m, seed)
        for seed in range(options.seed, last)
        for m in chosen
        if m != "unigram" or seed == options.seed
    ]


def _row(model: str, seed: int, found: Corpus) -> list[Any]:
    train, test = found.train, found.test
    if model == "unigram":
        empty = [None] * (len(HEADER) - 4)
        return [model, seed, None, metrics.unigram_perplexity(train.counts, test.counts), *empty]
    made = {**OURS, **PEERS}[model](n_components=K, random_state=seed)
    cpu = timed_fit(made, train.counts)
    return [model, seed, cpu, *measures(made, found)]


def measures(model: Any, found: Corpus) -> list[Any]:
    """Everything after the seconds, in the order of HEADER."""
    train, test = found.train, found.test
    accuracy = None
    if train.labels is not None:
        accuracy = metrics.classification(
            model, train.counts, train.labels, test.counts, test.labels
        ).accuracy
    return [
        metrics.dc_perplexity(model, test.counts),
        metrics.npmi(model, train.counts).mean,
        metrics.npmi(model, test.counts).mean,
        metrics.topic_diversity(model, top_n=25),
        metrics.topic_diversity(model, top_n=10),
        metrics.inverted_rbo(model),
        metrics.collapse(model, train.counts).num_active,
        accuracy,
    ]


def _old(results: Path, key: str) -> list[dict[str, Any]]:
    path = results / "topics.json"
    return json.loads(path.read_text()).get(key, []) if path.exists() else []


def main() -> None:
    options = parser(__doc__, data=True)
    parts = ["quality", "labels"]
    options.add_argument("--parts", nargs="*", default=parts, choices=parts)
    options.add_argument("--models", nargs="*", default=[], help="by default all")
    options.add_argument("--seeds", type=int, default=3)
    chosen = options.parse_args()
    for part, name in zip(parts, CORPORA, strict=False):
        if part in chosen.parts:
            quality(chosen, name)


if __name__ == "__main__":
    main()
