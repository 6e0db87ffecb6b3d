"""Several modes of a posterior, from many starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvi.guides.mode import LogJoint
from pvi.optim.mode import maximize

SPREAD = 3.0  # sd of the starts in unconstrained space
CLIMB, RATE = 200, 0.1  # steps that all starts take together, each so long at first
APART = 1.0  # posterior sds between two modes


@dataclass(frozen=True)
class Mode:
    """One solution of a fit with `restarts`.

    Args:
        bound: of the guide there, nats.
        share: of the posterior's mass, if the modes do not overlap and the bounds are as tight:
            $\\exp(L_m) / \\sum_j \\exp(L_j)$.
        mean: of each site, in the model's space.
    """

    bound: float
    share: float
    mean: dict[str, Tensor]


def shares(bounds: Sequence[float]) -> list[float]:
    """The softmax of the bounds.

    >>> shares([-3.0, -3.0])
    [0.5, 0.5]
    """
    weights = [math.exp(bound - max(bounds)) for bound in bounds]
    return [weight / sum(weights) for weight in weights]


def find_modes(density: LogJoint, start: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Distinct modes and their curvatures, by climbing from `count` points around `start`.

    All points climb together at first, so that a start costs little; then each is taken to its end.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, len(start), generator=generator, dtype=torch.float64, device="cpu")
    noise[0] = 0.0
    points = _climb(density, start + SPREAD * noise.to(start))
    found: list[tuple[Tensor, Tensor]] = []
    for point in points:
        if not bool(point.isfinite().all()):
            continue
        mode = maximize(density, point)
        gradient, curvature = density.derivatives(mode)
        root, failed = torch.linalg.cholesky_ex(curvature)
        if int(failed) or not bool(root.isfinite().all()):
            continue
        mode = mode + torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
        if all(_distance(mode, *other) > APART for other in found):
            found.append((mode, curvature))
    return found


def _climb(density: LogJoint, points: Tensor) -> Tensor:
    """Steps of Adam for every point on its own."""
    points = points.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=RATE)
    for step in range(CLIMB):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = -density.many(points)
            kept = loss[loss.isfinite()]
            if not len(kept):
                break
            kept.sum().backward()
        if points.grad is not None:
            points.grad.nan_to_num_(0.0)
        optimizer.param_groups[0]["lr"] = RATE * (1.0 - step / CLIMB)
        optimizer.step()
    return points.detach()


def _distance(point: Tensor, mode: Tensor, curvature: Tensor) -> float:
    """In posterior sds, by the curvature at the mode."""
    gap = point - mode
    return float((gap @ curvature @ gap).clamp(min=0.0).sqrt())
