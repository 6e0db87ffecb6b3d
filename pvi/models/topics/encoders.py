"""Encoders: from a document to the numbers of its posterior, each document by itself."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, softplus

from pvi.errors import ModelError
from pvi.models.topics.counts import Bag
from pvi.models.topics.normalization import BatchNorm
from pvi.nn import Component

READS = ("words", "embeddings", "both")


class Encoder(Component):
    """Words, precomputed embeddings of the document, or both, through layers with softplus.

    $$h = a(W x + U e + b), \\quad \\ldots, \\quad \\mathrm{norm}(V h + c)$$

    with word counts x, of which only those that are not 0 are read. The last normalisation is by
    running statistics when documents are transformed, so none depends on its batch.

    Args:
        vocabulary: V, number of words.
        outputs: how many numbers.
        reads: "words", "embeddings" or "both".
        embeddings: length of an embedding; those of covariates count too.
        hidden: units of the layers.
        dropout: share of hidden units that are dropped in training.
        normalize: whether outputs are normalised over the batch in training.
    """

    def __init__(
        self,
        vocabulary: int,
        outputs: int,
        *,
        reads: str = "words",
        embeddings: int = 0,
        covariates: int = 0,
        hidden: Sequence[int] = (100, 100),
        dropout: float = 0.0,
        normalize: bool = True,
        log_counts: bool = False,
    ):
        super().__init__()
        if reads not in READS:
            raise ModelError(f"encoder must be one of {READS}, got {reads!r}")
        self.vocabulary, self.outputs, self.reads = vocabulary, outputs, reads
        self.embeddings, self.covariates = embeddings, covariates
        self.hidden, self.dropout = tuple(hidden), dropout
        self.normalize, self.log_counts = normalize, log_counts
        first = self.hidden[0]
        self.bias = nn.Parameter(torch.zeros(first))
        if reads != "embeddings":
            bound = math.sqrt(6.0 / (vocabulary + first))
            self.words = nn.Parameter(torch.empty(vocabulary, first).uniform_(-bound, bound))
        if reads != "words":
            self.document = nn.Linear(embeddings, first, bias=False)
        if covariates:
            self.covariate = nn.Linear(covariates, first, bias=False)
        pairs = zip(self.hidden, self.hidden[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(self.hidden[-1], outputs)
        self.norm = BatchNorm(outputs) if normalize else nn.Identity()

    def forward(
        self, bag: Bag, embeddings: Tensor | None = None, covariates: Tensor | None = None
    ) -> Tensor:
        """Numbers `(B, outputs)`.

        Args:
            bag: the words of B documents.
            embeddings: `(B, E)`.
            covariates: `(B, C)`.
        """
        h = self.bias
        if self.reads != "embeddings":
            counts = bag.counts.log1p() if self.log_counts else bag.counts
            weights = counts.to(self.words)
            h = h + embedding_bag(
                bag.words, self.words, bag.starts, mode="sum", per_sample_weights=weights
            )
        if self.reads != "words":
            h = h + self.document(embeddings)
        if self.covariates:
            h = h + self.covariate(covariates)
        h = softplus(h)
        for layer in self.layers:
            h = softplus(layer(h))
        return self.norm(self.last(self.drop(h)))
