"""Normalisation over the batch in training, by running statistics for everything else."""

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from pvi.nn import Component


class BatchNorm(Component):
    """Each number minus its mean, by its standard deviation, and a learned shift.

    In a step of a fit these are the batch's own; in evaluation mode, and wherever no gradient is
    taken, they are running means over the steps: constants, so that rows don't depend on their
    batch.

    Args:
        features: numbers in a row.
        momentum: share of a step in the running means.
        shift: whether a shift is learned.
        eps: is added to variances. That of ProdLDA's authors: where logits vary less than this,
            their weights keep a scale, without which the top words are the rarest.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, features: int, momentum: float = 0.1, shift: bool = True, eps: float = 1e-3):
        super().__init__()
        self.features, self.momentum, self.shift, self.eps = features, momentum, shift, eps
        self.bias = torch.nn.Parameter(torch.zeros(features)) if shift else None
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.features)
        live = self.training and torch.is_grad_enabled() and len(flat) > 1
        running = (self.mean, self.variance)
        found = batch_norm(flat, *running, None, self.bias, live, self.momentum, self.eps)
        return found.reshape(x.shape)
