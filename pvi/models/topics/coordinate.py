"""Posteriors of shares by coordinate ascent, in the place of an encoder."""

import torch
from torch import Tensor

from pvi.models.topics.counts import Bag
from pvi.nn import Component


class CoordinateAscent(Component):
    """$q(\\theta) = \\mathrm{Dirichlet}(\\gamma)$ by the local step of variational Bayes.

    $$\\phi_{wk} \\propto \\beta_{kw} e^{\\psi(\\gamma_k)}, \\qquad
      \\gamma_k = \\alpha + \\sum_w n_w \\phi_{wk}$$

    some times over, from equal shares. There is nothing to be trained, and no gap to what a network
    can learn; the posterior is a constant of the gradient, which then is that of variational EM.

    Args:
        topics: K.
        concentration: $\\alpha$ of the prior.
        steps: how many times.

    Reference:
        Blei, Ng and Jordan (2003), eqs. 6 and 7; Hoffman, Blei and Bach (2010), Online learning for
        Latent Dirichlet Allocation.
    """

    reads = "words"
    embeddings = 0

    def __init__(self, topics: int, concentration: float, steps: int = 10):
        super().__init__()
        self.topics, self.concentration, self.steps = topics, concentration, steps

    def forward(self, bag: Bag, rows: Tensor) -> Tensor:
        """$\\gamma$ `(B, K)`.

        Args:
            bag: the words of B documents.
            rows: $\\beta$ of each of its words `(n, K)`.
        """
        with torch.no_grad():
            counts = bag.counts.to(rows)
            lengths = bag.summed(counts).unsqueeze(-1)
            gamma = self.concentration + (lengths / self.topics).expand(-1, self.topics)
            for _ in range(self.steps):
                phi = self._assigned(bag, rows, gamma)
                gamma = torch.full_like(gamma, self.concentration)
                gamma = gamma.index_add(0, bag.documents, phi)
            return gamma

    def assigned(self, bag: Bag, rows: Tensor) -> Tensor:
        """$n_w \\phi_{wk}$, the counts of each word by topics `(n, K)`.

        Args:
            bag, rows: as of `forward`.
        """
        return self._assigned(bag, rows, self(bag, rows))

    def _assigned(self, bag: Bag, rows: Tensor, gamma: Tensor) -> Tensor:
        phi = rows * gamma.digamma().exp().index_select(0, bag.documents)
        total = phi.sum(-1).clamp(min=torch.finfo(rows.dtype).tiny)
        return phi * (bag.counts.to(rows) / total).unsqueeze(-1)
