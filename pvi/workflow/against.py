"""A posterior beside draws of Markov chain Monte Carlo: how far off is which parameter?"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvi.diagnostics.table import MAX_DIM, scalars
from pvi.errors import DataError
from pvi.posterior.arviz import load
from pvi.text import table as text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SHOWN = 12  # rows printed
MAX_PAIRED = 200  # scalars whose correlations are compared


@dataclass(frozen=True)
class Distance:
    """One scalar of the guide beside the chains; all but `ess` in the chains' sds.

    `error` is the difference of the means, `sd_ratio` the guide's sd over the chains', `w1` and
    `w2` the Wasserstein distances of the two samples. `error_se` and `sd_ratio_se` are Monte Carlo
    errors of both samples together, and `floor` is the `w2` that two samples of these sizes from
    the guide itself have.
    """

    name: str
    error: float
    error_se: float
    sd_ratio: float
    sd_ratio_se: float
    w1: float
    w2: float
    floor: float
    ess: float


COLUMNS = tuple(Distance.__dataclass_fields__)


@dataclass(frozen=True)
class Against:
    """A posterior beside the draws of Markov chains.

    Attributes:
        rows: One for each scalar, the largest `w2` first.
        correlation_gap: Largest difference of a correlation between two scalars, of the first 200.
        correlation_se: Its Monte Carlo error, of a pair that does not correlate.
        pair: The two scalars.
        num_draws: Of the guide.
        left_out: Sites that only one of the two has.
    """

    rows: tuple[Distance, ...]
    correlation_gap: float
    correlation_se: float
    pair: tuple[str, ...]
    num_draws: int
    left_out: tuple[str, ...] = ()

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame indexed by parameter name."""
        import pandas as pd

        return pd.DataFrame([asdict(r) for r in self.rows], columns=COLUMNS).set_index("name")

    def plot(self) -> "Figure":
        """Errors of means and ratios of sds with their Monte Carlo errors; see `pvi.plots`."""
        from pvi.plots.compare import plot_against

        return plot_against(self.rows)

    def __str__(self) -> str:
        worst = self.rows[0]
        lines = [
            f"furthest off: {worst.name}, mean by {worst.error:+.2f} +- {worst.error_se:.2f} sd, "
            f"sd x {worst.sd_ratio:.2f} +- {worst.sd_ratio_se:.2f}"
        ]
        if self.pair:
            lines.append(
                f"largest gap of a correlation: {self.correlation_gap:.2f} +- "
                f"{self.correlation_se:.2f}, of {' and '.join(self.pair)}"
            )
        cells = [
            [row.name, *(f"{getattr(row, c): .2f}" for c in COLUMNS[1:-1]), f"{row.ess:,.0f}"]
            for row in self.rows[:MAX_SHOWN]
        ]
        lines.append(text_table(COLUMNS, cells))
        hidden = len(self.rows) - len(cells)
        lines += [f"({hidden} more rows, none further off)"] if hidden else []
        left = ", ".join(self.left_out)
        lines += [f"only on one side, and left out: {left}"] if left else []
        return "\n".join(lines)


def against(target: Any, mcmc_draws: Any, *, num_draws: int = 4000, seed: int = 0) -> Against:
    r"""Compare a posterior with draws of Markov chains, parameter by parameter.

    .. math:: W_p = \Big(\int_0^1 |F^{-1}(u) - G^{-1}(u)|^p\,du\Big)^{1/p} \Big/ \mathrm{sd}_F

    between the samples' quantile functions, F the chains' and G the guide's, without binning.

    Args:
        target: A `Posterior`, or anything with a `.posterior` (a `Fit`).
        mcmc_draws: `InferenceData` or `DataTree` with a group posterior, a `pyro.infer.MCMC` that
            has run, the result of `pvi.nuts`, or a dict from a site's name to its draws, `(chains,
            draws, *site shape)` or `(draws, *site shape)`.
        num_draws: Of the guide.
        seed: Of the draws.

    Returns:
        Errors in the chains' sds with their Monte Carlo errors; `print` it.

    Raises:
        DataError: No site in common, draws of another shape, or that are not finite.

    Example:
        >>> import pyro, pyro.distributions as dist, pvi
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def model():
        ...     guide()
        ...     pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
        >>> found = against(pvi.Posterior(model, guide), {"z": 0.5 + torch.randn(4, 1000)})
        >>> round(found.rows[0].error, 1)
        -0.5
    """
    posterior = getattr(target, "posterior", target)
    ours = {n: v.cpu() for n, v in posterior.sample(num_draws, seed=seed).items()}
    given = _draws_of(mcmc_draws)
    common = [name for name in ours if name in given and ours[name].is_floating_point()]
    if not common:
        raise DataError(f"no site in common: the chains have {list(given)}, the model {list(ours)}")
    left_out = tuple(sorted(set(ours) ^ set(given)))
    chains = {name: _shaped(name, given[name], ours[name].shape[1:]) for name in common}
    names, x = scalars({name: ours[name] for name in common}, MAX_DIM)
    count = {v.shape[:2] for v in chains.values()}
    if len(count) > 1:
        raise DataError(f"the chains' sites have different numbers of chains and draws: {count}")
    shape = count.pop()
    _, y = scalars({n: v.reshape(-1, *v.shape[2:]) for n, v in chains.items()}, MAX_DIM)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        _row(name, a, b, (shape[0], shape[1]), generator)
        for name, a, b in zip(names, x.T, y.T, strict=True)
    ]
    gap, pair = _correlation_gap(names[:MAX_PAIRED], x, y)
    least = min(row.ess for row in rows[:MAX_PAIRED])
    return Against(
        tuple(sorted(rows, key=lambda row: -row.w2)),
        gap,
        math.sqrt(1 / len(x) + 1 / least),
        pair,
        len(x),
        left_out,
    )


def wasserstein(x: Tensor, y: Tensor, power: float) -> float:
    """Wasserstein distance of two samples `(n,)` and `(m,)` of scalars, exactly."""
    n, m = len(x), len(y)
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # of n m
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    gaps = (x.sort().values[starts // m] - y.sort().values[starts // n]).abs()
    share = (ends - starts).double() / (n * m)
    return float((share @ gaps.double() ** power) ** (1 / power))


def _row(name: str, x: Tensor, y: Tensor, shape: tuple[int, int], generator: Any) -> Distance:
    """Draws `(S,)` of the guide and `(chains * draws,)` of the chains, compared."""
    arviz, sd = load(), y.std()
    if not float(sd) > 0.0:
        raise DataError(f"'{name}' is the same in all draws of the chains: it has no sd to compare")
    chains = y.reshape(shape).numpy()
    ess = float(arviz.ess(chains, method="mean"))
    ess_sd = float(arviz.ess(chains, method="sd"))
    ratio = x.std() / sd
    fourth = float(((y - y.mean()) / sd).pow(4).mean()) - 1.0  # variance of squared deviations
    own = float(((x - x.mean()) / x.std().clamp(min=1e-300)).pow(4).mean()) - 1.0
    some = torch.randint(len(x), (max(2, min(len(x), round(ess))),), generator=generator)
    return Distance(
        name=name,
        error=float((x.mean() - y.mean()) / sd),
        error_se=math.sqrt(1 / ess + float(ratio) ** 2 / len(x)),
        sd_ratio=float(ratio),
        sd_ratio_se=float(ratio) * math.sqrt(fourth / ess_sd + own / len(x)) / 2,
        w1=wasserstein(x, y, 1.0) / float(sd),
        w2=wasserstein(x, y, 2.0) / float(sd),
        floor=wasserstein(x, x[some], 2.0) / float(sd),
        ess=ess,
    )


def _correlation_gap(names: list[str], x: Tensor, y: Tensor) -> tuple[float, tuple[str, ...]]:
    if len(names) < 2:
        return math.nan, ()
    count = len(names)
    gap = (torch.corrcoef(x[:, :count].T) - torch.corrcoef(y[:, :count].T)).abs().nan_to_num(0.0)
    i, j = sorted(divmod(int(gap.argmax()), count))
    return float(gap[i, j]), (names[i], names[j])


def _draws_of(given: Any) -> dict[str, Any]:
    """Draws by site, as arrays."""
    if hasattr(given, "to_arviz"):
        given = given.to_arviz()
    if hasattr(given, "get_samples"):  # a Pyro MCMC
        return dict(given.get_samples(group_by_chain=True))
    if isinstance(given, dict):
        return {str(name): value for name, value in given.items()}
    try:
        group = given["posterior"]
    except (KeyError, TypeError):
        raise DataError(
            "mcmc_draws must be InferenceData or a DataTree with a group 'posterior', a Pyro MCMC "
            f"that has run, or a dict of arrays; got {type(given).__name__}"
        ) from None
    group = getattr(group, "dataset", group)
    return {str(n): v.transpose("chain", "draw", ...).values for n, v in group.data_vars.items()}


def _shaped(name: str, value: Any, shape: torch.Size) -> Tensor:
    """Draws `(chains, draws, *site shape)` of what came."""
    x = torch.as_tensor(np.asarray(value.cpu() if isinstance(value, Tensor) else value))
    numbers = shape.numel()
    lead = x.shape[:1] if x.dim() <= len(shape) + 1 and x[0].numel() == numbers else x.shape[:2]
    if x.numel() != lead.numel() * numbers or x.dim() < len(lead):
        raise DataError(
            f"draws of '{name}' have shape {tuple(x.shape)}, but the site has {tuple(shape)}: give "
            "(chains, draws, *site shape) or (draws, *site shape)"
        )
    if not bool(x.isfinite().all()):
        raise DataError(f"draws of '{name}' are not all finite")
    return x.double().reshape(lead.numel() // lead[-1], lead[-1], *shape)
