"""Optimal transport between topics and words, by Sinkhorn's iterations."""

import torch
from torch import Tensor


def transport_cost(cost: Tensor, *, precision: float = 20.0, iterations: int = 50) -> Tensor:
    """$\\sum_{kw} \\pi_{kw} C_{kw}$ for the entropic plan $\\pi$ between uniform masses.

    The plan is a constant of the gradient, which is that of the entropic cost (Danskin).

    Args:
        cost: C `(*batch, K, V)`.
        precision: inverse of the entropy's weight.
        iterations: of Sinkhorn's.

    Returns:
        `(*batch)`.

    >>> transport_cost(torch.tensor([[0.0, 9.0], [9.0, 0.0]])).round(decimals=4)
    tensor(0.)
    """
    with torch.no_grad():
        log_kernel = -precision * cost
        rows, columns = cost.shape[-2:]
        u = torch.zeros_like(cost[..., :, :1])
        v = torch.zeros_like(cost[..., :1, :])
        for _ in range(iterations):
            u = -torch.logsumexp(log_kernel + v, -1, keepdim=True) - torch.tensor(rows).log()
            v = -torch.logsumexp(log_kernel + u, -2, keepdim=True) - torch.tensor(columns).log()
        plan = (log_kernel + u + v).exp()
    return (plan * cost).sum((-2, -1))
