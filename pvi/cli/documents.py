"""A topic model of a corpus: fit, evaluation, tables, pictures, one page."""

from pathlib import Path
from typing import Any

import numpy as np

from pvi.cli.program import UsageError
from pvi.datasets import Corpus, corpus
from pvi.errors import DataError
from pvi.models import topics as family
from pvi.models.topics.output import TopicReport
from pvi.text import table

MODELS = {
    "prodlda": "ProdLDA",
    "lda": "LDA",
    "etm": "ETM",
    "supervised": "SupervisedLDA",
    "dynamic": "DynamicETM",
}
PERIODS = 10  # of the dynamic model


def run(
    path: str,
    out: Path,
    *,
    model: str,
    k: int,
    epochs: int | None,
    seed: int,
    reading: dict[str, Any],
) -> str:
    """Fit, evaluate and write everything; the verdict on convergence."""
    if model not in MODELS:
        raise UsageError(f"--model: expected one of {', '.join(MODELS)}, got {model}")
    if (listed := reading["stop_words"]) not in (None, "english"):
        raise UsageError(f"--stop-words: expected english or none, got {listed}")
    found = corpus(path, seed=seed, **reading)
    print(f"{found}\n", flush=True)
    fitted, more, labels = _inputs(model, found)
    made = getattr(family, MODELS[model])(n_components=k, random_state=seed)
    if epochs is not None:
        made.set_params(epochs=epochs)
    made.fit(fitted.train.counts, labels, **more[0])
    made.save(out / "model")
    report = TopicReport(made, fitted, more=more)
    print(f"{made.fit_}\n\n{table(('', '', ''), report.numbers())}\n", flush=True)
    print(report.table().head(20).to_string(columns=["share", "npmi", "words"]), flush=True)
    lead = f"{MODELS[model]} with {k} topics. {fitted}."
    report.write(out, f"pvi topics: {found.name}", lead)
    fit = made.fit_
    return "converged" if fit.converged else f"not converged: {fit.reason}"


def _inputs(model: str, found: Corpus) -> tuple[Corpus, Any, Any]:
    """The corpus, what the model takes besides counts in training and later, and labels."""
    if model == "supervised":
        if found.train.labels is None:
            raise DataError("--model supervised needs labels: a column label, or --label NAME")
        return found, ({}, {}), found.train.labels
    if model == "dynamic":
        if found.train.times is None:
            raise DataError("--model dynamic needs times: a column time, or --time NAME")
        return _in_periods(found)
    return found, ({}, {}), None


def _in_periods(found: Corpus) -> tuple[Corpus, Any, None]:
    """Documents that have a time, and of ten periods of equal length, the middle of theirs."""
    halves, seconds, dates = [], [], False
    for part in (found.train, found.test):
        times: Any = part.times
        dates = times.dtype.kind == "M"
        numbers = times.astype("datetime64[s]").astype(float) if dates else times.astype(float)
        known = ~(np.isnat(times) if dates else np.isnan(numbers))
        if part is found.train and not known.any():
            raise DataError("--model dynamic needs times, but no training document has one")
        halves.append(part.take(np.flatnonzero(known)))
        seconds.append(numbers[known])
    edges = np.linspace(seconds[0].min(), seconds[0].max(), PERIODS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    if dates:
        middles = middles.astype("datetime64[s]").astype("datetime64[D]")
    periods = [middles[np.searchsorted(edges[1:-1], part, side="right")] for part in seconds]
    seen = np.isin(periods[1], periods[0])  # a period without training documents has no topics
    halves[1], periods[1] = halves[1].take(np.flatnonzero(seen)), periods[1][seen]
    kept = Corpus(halves[0], halves[1], found.vocabulary, found.name)
    return kept, tuple({"times": part} for part in periods), None
