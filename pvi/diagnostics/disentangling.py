"""Does each factor of variation have a latent of its own? The mutual information gap."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pvi.engine.traces import flat_events, preserved_rng
from pvi.errors import DataError, GuideError
from pvi.progress import progress

NUMBERS = 5 * 10**6  # densities at a time


@dataclass(frozen=True)
class MutualInformationGap:
    """What `mutual_information_gap` found, nats.

    Attributes:
        gap: MIG, from 0 to 1.
        gaps: `(K,)` of each factor, in shares of its entropy.
        information: `(d, K)` of each latent about each factor.
        se: `(d, K)` its standard error over draws.
        entropy: `(K,)` of each factor.
    """

    gap: float
    gaps: Tensor
    information: Tensor
    se: Tensor
    entropy: Tensor


def mutual_information_gap(
    fn: Any, factors: Tensor, *, num_draws: int = 2000, seed: int = 0
) -> MutualInformationGap:
    r"""The mean over factors of how much more the best latent knows of one than the next best.

    .. math:: \mathrm{MIG} = \frac1K \sum_k \frac{1}{H(v_k)}
        \Big(I(z_{j_k}; v_k) - \max_{j \ne j_k} I(z_j; v_k)\Big), \qquad
        I(z_j; v_k) = E \log \frac{q(z_j \mid v_k)}{q(z_j)}

    where :math:`q(z_j)` and :math:`q(z_j \mid v_k)` are averages of :math:`q(z_j \mid x_n)` over
    all rows, and over those with this value of the factor. The expectation is over draws for random
    rows.

    Args:
        fn: q(z | x) of N rows, batch shape `(N,)`, with d independent latents.
        factors: `(N, K)` whole numbers from 0, the factors of each row, each with 2 values or more.
        num_draws: how many; the time grows as num_draws times N.
        seed: of the rows and draws.

    Raises:
        GuideError: the latents of a row are not independent, or fewer than two.
        DataError: factors are no such numbers.

    Reference:
        Chen, Li, Grosse, Duvenaud (2018), Isolating Sources of Disentanglement in VAEs, section 4.
    """
    flat = flat_events(fn)
    if flat is None or len(flat.batch_shape) != 2 or flat.batch_shape[1] < 2:
        raise GuideError("expected q(z | x) of N rows with two or more independent latents")
    v = _factors(factors, flat.batch_shape[0])
    member = torch.cat([one_hot(column) for column in v.T], 1).double()  # (N, all values)
    sizes = torch.stack([column.max() + 1 for column in v.T])
    place = v + torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])  # of each row's values
    with preserved_rng(), torch.no_grad():
        torch.manual_seed(seed)
        rows = torch.randint(len(v), (num_draws,))
        z = flat.sample()[rows]
        parts = torch.cat(list(_log_ratios(flat, z, member, place[rows])))  # (num_draws, d, K)
    information = parts.mean(0)
    shares = member.mean(0)
    entropy = torch.stack([torch.special.entr(part).sum() for part in shares.split(sizes.tolist())])
    best, next_best = information.topk(2, 0).values
    gaps = (best - next_best) / entropy
    se = parts.std(0) / num_draws**0.5
    return MutualInformationGap(float(gaps.mean()), gaps, information, se, entropy)


def _log_ratios(flat: Any, z: Tensor, member: Tensor, place: Tensor) -> Iterator[Tensor]:
    """$\\log q(z_j \\mid v_k) / q(z_j)$ at draws `(M, d)`: `(m, d, K)` for some at a time."""
    share = member / member.sum(0)
    size = max(1, NUMBERS // flat.batch_shape.numel())
    starts = range(0, len(z), size)
    for start in progress(starts, "mutual information"):
        log_q = flat.log_prob(z[start : start + size, None]).double().movedim(-1, 0)  # (d, m, N)
        q = (log_q - log_q.amax(-1, keepdim=True)).exp()
        given = torch.einsum("dmn,nv->mdv", q, share)
        at = place[start : start + size, None].expand(-1, given.shape[1], -1)
        yield given.gather(-1, at).log() - q.mean(-1).T.log().unsqueeze(-1)


def _factors(factors: Tensor, rows: int) -> Tensor:
    v = torch.as_tensor(factors)
    good = v.dim() == 2 and len(v) == rows and not v.is_floating_point()
    if not good or bool((v < 0).any()) or not bool((v != v[:1]).any(0).all()):
        raise DataError(
            f"factors must be whole numbers from 0 of shape ({rows}, K), each with two values or "
            f"more, got {v.dtype} of shape {tuple(v.shape)}"
        )
    return v.long()
