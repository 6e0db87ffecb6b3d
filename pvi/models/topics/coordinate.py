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
            tiny = torch.finfo(rows.dtype).tiny
            for _ in range(self.steps):
                phi = rows * gamma.digamma().exp().index_select(0, bag.documents)
                phi = phi * (counts / phi.sum(-1).clamp(min=tiny)).unsqueeze(-1)
                gamma = torch.full_like(gamma, self.concentration)
                gamma = gamma.index_add(0, bag.documents, phi)
            return gamma
