"""What the latents of single rows know of their data, and which of them do nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvi.engine.data import Data
from pvi.engine.pairing import pair
from pvi.engine.traces import Site, flat_events, preserved_rng, run
from pvi.errors import DataError, GuideError
from pvi.guides import Guide
from pvi.progress import progress
from pvi.text import table

ACTIVE = 0.01  # variance of the posterior means over the data (Burda et al. 2016)
UNUSED = 0.01  # nats: a dimension with a smaller KL is the prior
NEAR = 1.5  # nats below log N where the information is cut off
MAX_SHOWN = 12
ADVICE = (
    "warm the KL up (pvi.schedules), give each dimension free bits (pvi.FreeBits), lower beta "
    "(pvi.BetaELBO), or take a weaker decoder"
)


@dataclass(frozen=True)
class LatentSite:
    r"""One latent site of single rows; information in nats, averages over the N rows.

    Attributes:
        name: The site.
        num_rows: N.
        variance: `(D,)` variance over rows of the posterior mean of each number.
        kl_dims: `(D,)` mean KL(q || p) of each number's marginal; NaN without a closed form.
        kl: Mean KL of all of them together.
        kl_se: Its standard error over rows.
        exact: Whether it is in closed form, else from one draw a row.
        information: I_q(x; z) under the data's distribution, at most log N.
        information_se: Its standard error.
        gap: KL(q(z) || p(z)) of the average q over the data; NaN if the prior differs by row.
        gap_se: Its standard error.
    """

    name: str
    num_rows: int
    variance: Tensor
    kl_dims: Tensor
    kl: float
    kl_se: float
    exact: bool
    information: float
    information_se: float
    gap: float
    gap_se: float

    @property
    def active(self) -> Tensor:
        """`(D,)`, whether the posterior mean of each number follows the data."""
        return self.variance > ACTIVE

    @property
    def unused(self) -> float:
        """Share of numbers whose KL is below 0.01 nats; of inactive ones where it is unknown."""
        idle = ~self.active if bool(self.kl_dims.isnan().any()) else self.kl_dims < UNUSED
        return float(idle.double().mean())

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, each with the next step."""
        found, size = [], len(self.variance)
        if not bool(self.active.any()):
            found.append(f"collapsed: no number of '{self.name}' follows the data; {ADVICE}")
        elif self.unused > 0.5:
            found.append(f"{self.unused:.0%} of {size} numbers are unused; fewer do, or {ADVICE}")
        if self.information > math.log(self.num_rows) - NEAR:
            found.append(
                f"the information is near its limit log N = {math.log(self.num_rows):.2f} nats: "
                "that of more rows is larger, and the gap smaller by as much, so neither is known"
            )
        elif self.gap > 1.0 and self.gap > 3 * self.gap_se:
            found.append(
                "draws from the prior are unlike the latents of data, so new samples will look "
                "worse than reconstructions: a richer prior, or a larger beta"
            )
        return tuple(found)

    def __str__(self) -> str:
        how = "exact" if self.exact else "Monte Carlo"
        lines = [
            f"{self.name}: {int(self.active.sum())} of {len(self.variance)} numbers active, KL "
            f"{self.kl:.3g} +- {self.kl_se:.2g} nats a row ({how})",
            f"information {self.information:.3g} +- {self.information_se:.2g} (at most log N = "
            f"{math.log(self.num_rows):.2f}), gap of the average posterior to the prior "
            f"{self.gap:.3g} +- {self.gap_se:.2g}",
            *(f"- {finding}" for finding in self.findings),
        ]
        order = torch.argsort(self.variance, descending=True)[:MAX_SHOWN].tolist()
        on = ["yes" if active else "no" for active in self.active]
        rows = [
            (f"{self.name}[{i}]", f"{self.kl_dims[i]:.3g}", f"{self.variance[i]:.3g}", on[i])
            for i in order
        ]
        lines.append(table(("number", "KL", "variance of mean", "active"), rows))
        hidden = len(self.variance) - len(rows)
        return "\n".join(lines + [f"({hidden} more, with smaller variances)"] * bool(hidden))


@dataclass(frozen=True)
class Latents:
    """What `latents` found: one `LatentSite` for each; `print` it."""

    sites: tuple[LatentSite, ...]

    def __getitem__(self, name: str) -> LatentSite:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"'{name}' is none of {[s.name for s in self.sites]}")

    def to_pandas(self) -> Any:
        """One row for each number: site, KL, variance of the mean, active."""
        import pandas as pd

        frames = [
            pd.DataFrame(
                {
                    "site": s.name,
                    "kl": s.kl_dims.numpy(),
                    "variance": s.variance.numpy(),
                    "active": s.active.numpy(),
                }
            )
            for s in self.sites
        ]
        return pd.concat(frames).rename_axis("number").reset_index()

    def __str__(self) -> str:
        return "\n".join(map(str, self.sites))


def latents(
    target: Any,
    data: Any = None,
    *,
    site: str | None = None,
    batch_size: int = 1000,
    num_draws: int = 1000,
    seed: int = 0,
) -> Latents:
    r"""How much the latents of single rows (a VAE's code, say) know of the data.

    The mean KL of the ELBO splits into two parts ("ELBO surgery"), with
    :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`:

    .. math:: \frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \| p(z))
        = I_q(x; z) + \mathrm{KL}(q(z) \| p(z))

    Both are Monte Carlo averages over one draw for each of `num_draws` random rows; q(z) is
    summed over all N rows. :math:`I_q` is that of the N rows at hand, and at most log N: the
    information in a larger population is larger.

    Args:
        target: A `Posterior` or a `Fit`, whose guide has latents in the data's plate.
        data: Other data, as in `pvi.fit`; by default the training data.
        site: One of those latents; by default all.
        batch_size: Rows looked at together, which bounds the memory. Guides that own a row of
            parameters for each row are looked at whole.
        num_draws: Rows M that a draw is taken for; the time grows as M N.
        seed: Of the rows and the draws.

    Raises:
        GuideError: No latent belongs to the rows of the data.

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders, section 5.2 (active
        units); Hoffman, Johnson (2016), ELBO surgery.
    """
    posterior = getattr(target, "posterior", target)
    posterior = posterior if data is None else posterior.on(data)
    if min(batch_size, num_draws) < 1:
        raise DataError(f"batch_size and num_draws must be >= 1, got {batch_size}, {num_draws}")
    looks = _Looks(posterior, batch_size)
    with posterior.drawing(seed):
        tallies = {s.name: _Tally(s.name) for s, _ in next(looks.sites())}
        if not tallies or (site is not None and site not in tallies):
            raise GuideError(
                f"expected a continuous latent in the plate of the {looks.size:,} rows"
                f"{f', got site {site!r}' if site else ''}; there are {sorted(tallies) or 'none'}"
            )
        chosen = torch.zeros(looks.size, dtype=torch.bool)
        chosen[torch.randperm(looks.size)[:num_draws]] = True
        names = [site] if site else list(tallies)
        return Latents(tuple(_look(tallies[name], looks, chosen) for name in names))


@dataclass
class _Looks:
    """Passes over the data, batch by batch: each gives the local sites of its rows."""

    posterior: Any
    batch_size: int
    data: Data = field(init=False)

    def __post_init__(self) -> None:
        self.data, guide = self.posterior.data, self.posterior.guide
        if isinstance(guide, Guide) and not guide.amortized:
            self.batch_size = self.size

    @property
    def size(self) -> int:
        return self.data.size

    def sites(self, what: str = "") -> Iterator[list[tuple[Site, int]]]:
        """The sites, each with the dimension of its rows, counted from the right of the batch."""
        if self.size == 0:
            raise DataError("latents needs data with rows: data=, as in pvi.fit")
        parts = list(torch.arange(self.size).split(self.batch_size))
        for rows in progress(parts, what) if what else parts:
            args, kwargs = self.data.whole() if len(parts) == 1 else self.data.rows(rows)
            posterior = self.posterior
            guide_trace = run(posterior.guide, args, kwargs)
            found = pair(guide_trace, run(posterior.model, args, kwargs, guide_trace))
            yield [(s, dim) for s in found if (dim := _row_dim(s, len(rows))) is not None]


def _row_dim(site: Site, rows: int) -> int | None:
    if site.p is None or site.q is None or site.observed:
        return None
    if not site.q.value.is_floating_point():
        return None
    dims = [p.dim for p in site.plates if p.size == rows and p.dim is not None]
    return max(dims) if dims else None


@dataclass
class _Tally:
    """What has been seen of a site, row by row."""

    name: str
    means: list[Tensor] = field(default_factory=list)
    dims: list[Tensor] = field(default_factory=list)
    kls: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    exact: bool = True
    shared_prior: bool = True


def _look(tally: _Tally, looks: _Looks, chosen: Tensor) -> LatentSite:
    """Two passes: rows by themselves, then the draws under the posteriors of all rows."""
    start = 0
    for sites in looks.sites(f"latents {tally.name}"):
        one, dim = next((s, d) for s, d in sites if s.name == tally.name)
        count = one.q.fn.batch_shape[dim]  # type: ignore[union-attr]
        _add(tally, one, dim, chosen[start : start + count])
        start += count
    values, means = torch.cat(tally.values), torch.cat(tally.means)
    log_q = torch.full((len(values),), -math.inf, dtype=torch.float64)
    for sites in looks.sites(f"average posterior of {tally.name}"):
        one, dim = next((s, d) for s, d in sites if s.name == tally.name)
        log_q = torch.logaddexp(log_q, _under(one, dim, values))
    log_q = log_q - math.log(looks.size)
    kls, own, log_p = (torch.cat(x) for x in (tally.kls, tally.own, tally.log_p))
    information, gap = own - log_q, log_q - log_p
    gap = gap if tally.shared_prior else torch.full_like(gap, math.nan)
    return LatentSite(
        name=tally.name,
        num_rows=looks.size,
        variance=means.var(0, correction=0),
        kl_dims=torch.cat(tally.dims).mean(0),
        kl=float(kls.mean()),
        kl_se=_se(kls),
        exact=tally.exact,
        information=float(information.mean()),
        information_se=_se(information),
        gap=float(gap.mean()),
        gap_se=_se(gap),
    )


def _se(x: Tensor) -> float:
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan


def _rows(x: Tensor, dim: int, event: int) -> Tensor:
    """A tensor `(*batch, *event)` as `(rows, numbers)`, in double precision."""
    return x.movedim(dim - event, 0).flatten(1).double().cpu() if x.dim() > 1 else _column(x)


def _column(x: Tensor) -> Tensor:
    return x.double().cpu()[:, None]


def _add(tally: _Tally, site: Site, dim: int, keep: Tensor) -> None:
    """One batch of rows."""
    p, q, event = site.p, site.q, site.q.fn.event_dim  # type: ignore[union-attr]
    if p is None or q is None:  # `_row_dim` leaves those out
        return
    tally.means.append(_rows(_mean(q.fn, q.value.shape), dim, event))
    tally.dims.append(_rows(_marginal_kls(q.fn, p.fn, q.value), dim, event))
    own, log_p = (_rows(side.log_prob(), dim, 0).sum(1) for side in (q, p))
    try:
        kl = _rows(kl_divergence(q.fn, p.fn).expand(q.fn.batch_shape), dim, 0).sum(1)
    except NotImplementedError:
        kl, tally.exact = own - log_p, False
    tally.kls.append(kl)
    tally.own.append(own[keep])
    tally.log_p.append(log_p[keep])
    value = q.value.movedim(dim - event, 0)
    tally.values.append(value[keep.to(value.device)])
    first = value[:1].movedim(0, dim - event).expand(q.value.shape)
    same = _rows(p.fn.log_prob(first), dim, 0)
    tally.shared_prior &= bool(torch.allclose(same, same[:1].expand_as(same), atol=1e-5))


def _mean(fn: Any, shape: torch.Size) -> Tensor:
    try:
        return fn.mean.expand(shape)
    except NotImplementedError:
        with preserved_rng():
            return torch.stack([fn.sample().expand(shape) for _ in range(100)]).mean(0)


def _marginal_kls(q: Any, p: Any, value: Tensor) -> Tensor:
    """KL of each number's marginal, normal in both; NaN where they are something else."""
    flat_p, flat_q = flat_events(p), flat_events(q)
    if flat_q is None and getattr(q, "covariance_matrix", None) is not None:
        flat_q = torch.distributions.Normal(q.mean, q.stddev)
    if flat_p is None or flat_q is None:
        return torch.full_like(value, math.nan)
    try:
        return kl_divergence(flat_q, flat_p).expand(value.shape)
    except NotImplementedError:
        return torch.full_like(value, math.nan)


def _under(site: Site, dim: int, values: Tensor) -> Tensor:
    """Log of the sum over these rows of q(z_m | x_n), `(M,)`."""
    fn = site.q.fn  # type: ignore[union-attr]
    size = max(1, 10**6 // max(fn.shape().numel(), 1))
    parts = []
    for z in values.split(size):
        z = z.unsqueeze(1).movedim(1, dim - fn.event_dim)
        log_q = fn.log_prob(z)  # (m, *batch)
        log_q = log_q.movedim(dim, -1).reshape(len(z), -1, fn.batch_shape[dim]).sum(1)
        parts.append(torch.logsumexp(log_q.double().cpu(), 1))
    return torch.cat(parts)
