"""Topic models on many documents and words: peak memory and documents a second.

    python -m benchmarks.topics_scale [--documents 200000] [--words 50000] [--epochs 1]

Synthetic counts in CSR form, from 50 topics with 1,000 words of their own each and words by a power
law, 60 tokens a document on average. Each model fits in a process of its own, whose peak memory
includes Python, torch and the corpus. scikit-learn's online LDA makes as many passes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.common import parser, report

K, TOKENS, BLOCK = 50, 60, 5000
MODELS = ("LDA", "ProdLDA", "scikit-learn LDA")
HEADER = (
    "model",
    "documents",
    "words",
    "epochs",
    "fit CPU s",
    "fit documents/s",
    "transform documents/s",
    "peak MB",
    "corpus MB",
    "dc-ppl",
)


def synthetic(documents: int, words: int, seed: int) -> sparse.csr_matrix:
    """Documents of one to three topics, made 5,000 at a time."""
    rng = np.random.default_rng(seed)
    common = 1.0 / np.arange(10, words + 10)
    beta = np.tile(0.3 * common / common.sum(), (K, 1))
    for row in beta:
        own = rng.choice(words, min(1000, words // 2), replace=False)
        row[own] += 0.7 * rng.dirichlet(np.full(len(own), 0.3))
    cumulative = beta.cumsum(1)
    blocks = [
        _block(cumulative, min(BLOCK, documents - start), rng)
        for start in range(0, documents, BLOCK)
    ]
    return sparse.vstack(blocks).tocsr()


def _block(cumulative: np.ndarray, number: int, rng: np.random.Generator) -> sparse.csr_matrix:
    lengths = 1 + rng.poisson(TOKENS - 1, number)
    rows = np.repeat(np.arange(number), lengths)
    topics = rng.integers(0, K, (number, 3))[rows, rng.integers(0, 3, len(rows))]
    columns, width = np.empty(len(rows), np.int64), cumulative.shape[1]
    draws = rng.random(len(rows))
    for k in range(K):
        at = topics == k
        columns[at] = np.searchsorted(cumulative[k], draws[at] * cumulative[k, -1])
    ones = np.ones(len(rows), np.float32)
    return sparse.csr_matrix((ones, (rows, columns.clip(max=width - 1))), (number, width))


def one(options: Any) -> list[Any]:
    """Fit one model in this process."""
    import torch

    from benchmarks.topics_peers import sklearn_lda
    from pvi.models.topics import LDA, ProdLDA, metrics

    torch.set_num_threads(1)
    train = synthetic(options.documents, options.words, options.seed)
    test = synthetic(2000, options.words, options.seed + 1)
    if options.model == "scikit-learn LDA":
        made = sklearn_lda(K, options.seed).set_params(max_iter=options.epochs)
    else:
        kind = {"LDA": LDA, "ProdLDA": ProdLDA}[options.model]
        made = kind(K, epochs=options.epochs, random_state=options.seed)
    start = time.process_time()
    made.fit(train)
    seconds = time.process_time() - start
    start = time.process_time()
    made.transform(train[:5000])
    asked = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(x.nbytes for x in (train.data, train.indices, train.indptr)) / 2**20
    rates = (options.documents * options.epochs / seconds, 5000 / asked)
    perplexity = metrics.dc_perplexity(made, test)
    shape = (options.documents, options.words, options.epochs)
    return [options.model, *shape, seconds, *rates, peak, size, perplexity]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--documents", type=int, default=200_000)
    options.add_argument("--words", type=int, default=50_000)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    options.add_argument("--model", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.model:
        print(json.dumps(one(chosen)), flush=True)
        return
    rows = []
    for model in chosen.models:
        words = [f"--{n}={getattr(chosen, n)}" for n in ("documents", "words", "epochs", "seed")]
        command = [sys.executable, "-m", "benchmarks.topics_scale", f"--model={model}", *words]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        report("topics_scale", HEADER, rows, chosen.results)


if __name__ == "__main__":
    main()
