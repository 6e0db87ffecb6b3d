"""Parts by their names, put together for a corpus."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvi.errors import DataError, ModelError
from pvi.models.topics.coordinate import CoordinateAscent
from pvi.models.topics.counts import Counts
from pvi.models.topics.decoders import Decoder, Mixture, Product, Sparse
from pvi.models.topics.embedded import Clustered, Dynamic, Embedded, place
from pvi.models.topics.encoders import READS, Encoder
from pvi.models.topics.families import (
    Correlated,
    Dirichlet,
    Family,
    LaplaceDirichlet,
    LogisticNormal,
)
from pvi.models.topics.gammas import GammaShares, WeibullShares
from pvi.models.topics.heads import Head, Labels
from pvi.models.topics.inputs import numbers
from pvi.models.topics.options import check_options
from pvi.models.topics.positions import word_positions
from pvi.models.topics.programs import TopicPrograms
from pvi.models.topics.seeding import document_topics, maximised

FAMILIES: dict[str, Any] = {
    "logistic_normal": LogisticNormal,
    "laplace_dirichlet": LaplaceDirichlet,
    "correlated": Correlated,
    "dirichlet": Dirichlet,
    "gamma": GammaShares,
    "weibull": WeibullShares,
}


def assemble(options: Any, data: Counts, documents: int | None = None) -> TopicPrograms:
    """Untrained programs for a corpus.

    Args:
        options: the estimator, whose parameters say which parts.
        data: the corpus, or a piece of it.
        documents: of the whole, where it is a piece.
    """
    check_options(options)
    matrix, more = data.matrix, data.columns
    topics, vocabulary = int(options.n_components), matrix.shape[1]
    covariates = more["covariates"].shape[1] if "covariates" in more else 0
    family = family_of(options, topics)
    times = int(more["times"].max()) + 1 if "times" in more else 0
    if (covariates or times) and not family.real:
        raise ModelError(
            f"covariates and times shift the mean of a normal prior, which {type(family).__name__} "
            "has not: use family='logistic_normal', 'laplace_dirichlet' or 'correlated'"
        )
    embeddings = more["embeddings"].shape[1] if "embeddings" in more else 0
    sizes = (vocabulary, family.width, embeddings, covariates + times)
    decoder = decoder_of(options, topics, vocabulary, times, matrix, documents)
    if options.encoder == "coordinate":
        encoder = coordinate_of(family, decoder, embeddings + covariates)
    else:
        encoder = encoder_of(options, *sizes)
    return TopicPrograms(
        family,
        encoder,
        decoder,
        [head_of(options, head, topics) for head in options.heads],
        covariates=covariates,
        times=times,
        bayesian=options.bayesian_topics,
    )


def family_of(options: Any, topics: int) -> Family:
    """The family, by its name or itself."""
    given = options.family
    if isinstance(given, Family):
        if given.topics != topics:
            raise ModelError(f"the family has {given.topics} topics, n_components is {topics}")
        return deepcopy(given)
    kind = named("family", given, FAMILIES)
    if options.concentration is None:
        return kind(topics)
    if kind in (LogisticNormal, Correlated):
        raise ModelError(f"family={given!r} has no concentration; use 'laplace_dirichlet'")
    return kind(topics, options.concentration)


def decoder_of(
    options: Any, topics: int, vocabulary: int, times: int, matrix: Any, documents: int | None
) -> Decoder:
    """The decoder, by its name or itself."""
    given = options.decoder
    if isinstance(given, Decoder):
        return deepcopy(given)
    places = given_positions(options, vocabulary)
    size = options.word_embeddings if places is None else places.shape[1]
    space = {"size": size, "learned": places is None}
    sizes, number = (topics, vocabulary), documents or matrix.shape[0]
    makers = {
        "mixture": lambda: Mixture(*sizes, options.topic_concentration),
        "product": lambda: Product(*sizes, options.topic_dropout, options.normalize),
        "sage": lambda: Sparse(*sizes, options.sparsity),
        "etm": lambda: Embedded(*sizes, **space),
        "ecrtm": lambda: Clustered(*sizes, number, normalize=options.normalize, **space),
        "dynamic": lambda: Dynamic(*sizes, times, step=options.step, **space),
    }
    decoder = named("decoder", given, makers)()
    if isinstance(decoder, Mixture | Sparse):
        start = maximised(matrix, document_topics(matrix, topics)).log()
        if isinstance(decoder, Sparse):
            decoder.background.copy_(log_frequencies(matrix))
            start -= decoder.background
        else:
            start -= start.mean(-1, keepdim=True)  # the prior's mean, and the same topics
        decoder.weights.data.copy_(start)
    if places is not None and isinstance(decoder, Embedded | Clustered | Dynamic):
        place(decoder, places)
    elif isinstance(decoder, Clustered):
        place(decoder, word_positions(matrix, decoder.space.positions.data))
    return decoder


def given_positions(options: Any, vocabulary: int) -> Tensor | None:
    """Positions of words, if they are given."""
    given = options.word_embeddings
    if isinstance(given, int):
        return None
    return numbers("word_embeddings", given, vocabulary, "word")


def log_frequencies(matrix: Any) -> Tensor:
    """Of each word in the corpus, with half a count more `(V,)`."""
    totals = np.asarray(matrix.sum(0), np.float64).ravel() + 0.5
    return torch.as_tensor(np.log(totals / totals.sum())).to(torch.get_default_dtype())


def coordinate_of(family: Family, decoder: Decoder, read: int) -> CoordinateAscent:
    """Coordinate ascent, where the model has it in closed form."""
    if not isinstance(family, Dirichlet) or decoder.dense or read:
        raise ModelError(
            "encoder='coordinate' is for family='dirichlet', mixtures of topics, and words alone; "
            "use encoder='words'"
        )
    return CoordinateAscent(family.topics, family.concentration)


def encoder_of(
    options: Any, vocabulary: int, outputs: int, embeddings: int, covariates: int
) -> Encoder:
    """The encoder, by what it reads or itself."""
    given = options.encoder
    if isinstance(given, Encoder):
        return deepcopy(given)
    if given not in READS:
        raise ModelError(f"encoder must be one of {READS} or an Encoder, got {given!r}")
    if (given == "words") != (embeddings == 0):
        needs = "needs" if embeddings == 0 else "does not read"
        raise DataError(f"encoder={given!r} {needs} embeddings= of the documents")
    return Encoder(
        vocabulary,
        outputs,
        reads=given,
        embeddings=embeddings,
        covariates=covariates,
        hidden=options.hidden,
        dropout=options.dropout,
        normalize=options.normalize,
    )


def head_of(options: Any, given: Any, topics: int) -> Head:
    """A head, by its name or itself."""
    if isinstance(given, Head):
        return deepcopy(given)
    makers = {"labels": lambda: Labels(topics, len(options.classes_), options.label_weight)}
    return named("heads", given, makers)()


def named(argument: str, name: Any, known: Mapping[str, Any]) -> Any:
    """What has a name.

    Raises:
        ModelError: nothing has.
    """
    if not isinstance(name, str) or name not in known:
        raise ModelError(f"{argument} must be one of {sorted(known)}, got {name!r}")
    return known[name]
