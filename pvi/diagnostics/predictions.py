"""Predictions of observed data together with the data's densities, from the same draws."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvi.engine.data import Data, as_data
from pvi.engine.plan import particle_slice
from pvi.engine.traces import density, free, run, sample_nodes, subset
from pvi.errors import DataError
from pvi.posterior.draws import Runner, stack, with_draws

MEMORY = 5 * 10**7  # numbers of predictions held at once


@dataclass(frozen=True)
class Predicted:
    """An observed site and what was predicted of it.

    Attributes:
        fn: Its distribution in a single run.
        observed: `(*batch, *event)`, the data.
        valid: `(*batch)`, False where the data are masked out.
        draws: `(S, *batch, *event)`, from the predictive.
        log_lik: `(S, *batch)`, log p(y | latents), nats; `None` where a sum over discrete sites
            joins data.
    """

    name: str
    fn: Any
    observed: Tensor
    valid: Tensor
    draws: Tensor
    log_lik: Tensor | None


@dataclass(frozen=True)
class Predictions:
    """All observed sites; `log_ratios` are log p - log q of the draws `(S,)`, nats, or `None`."""

    sites: tuple[Predicted, ...]
    log_ratios: Tensor | None
    num_draws: int
    local: tuple[str, ...]


def given(runner: Runner, num_draws: int, weigh: bool) -> Predictions:
    """The data of a posterior, every latent from the guide."""
    num_draws = affordable(runner.model_trace, runner.observed, num_draws)
    draws, densities, ratios = [], [], []
    for part in runner.runs(num_draws):
        draws.append(part.predictive(runner.observed))
        densities.append(part.log_likelihood())
        if weigh:
            found = part.draws()
            ratios.append(found.log_p - found.log_q)
    values, log_lik = stack(draws), stack(densities)
    nodes = sample_nodes(runner.model_trace)
    sites = tuple(_site(n, nodes[n], values[n], log_lik.get(n)) for n in runner.observed)
    return Predictions(sites, torch.cat(ratios) if weigh else None, num_draws, ())


def redrawn(posterior: Any, runner: Runner, new: Data, num_draws: int) -> Predictions:
    """Data whose local latents are drawn from the model, the others from the guide.

    Raises:
        DataError: the model can't run on these data, or has no observation there.
    """
    args, kwargs = new.whole()
    rows = posterior.data.size
    local = () if rows == 0 else tuple(n for n in runner.latent if n not in _shared(runner, rows))
    common = [n for n in runner.latent if n not in local]
    try:
        single = run(
            posterior.model, args, kwargs, subset(runner.guide_trace, common, indices=False)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the model can't run on these data with latents of the training data "
            f"({str(error).splitlines()[0]}). Give all of its arguments, the outcome too; latents "
            f"of other sizes than the rows' ({common}) must keep their shape."
        ) from error
    nodes = {n: x for n, x in sample_nodes(single).items() if n in runner.observed}
    nodes = {n: x for n, x in nodes.items() if x["is_observed"]}
    if not nodes:
        raise DataError(
            f"expected observations at {runner.observed}, but with these data the model observes "
            "nothing: give the outcome as in the fit"
        )
    num_draws = affordable(single, nodes, num_draws)
    values: list[dict[str, Tensor]] = []
    log_lik: list[dict[str, Tensor]] = []
    for trace, count in _latents(runner, num_draws, common):
        model = runner.repeat(posterior.model, count)
        fitted = run(model, args, kwargs, trace)
        drawn = run(free(model), args, kwargs, _unobserved(fitted))
        found = sample_nodes(fitted)
        densities = {n: density(found[n]).log_prob() for n in nodes}
        batch = {n: _batch(x) for n, x in nodes.items()}
        values.append({n: _drawn(drawn.nodes[n], x, count) for n, x in nodes.items()})
        log_lik.append({n: with_draws(x, count, batch[n]) for n, x in densities.items()})
    joined, dens = stack(values), stack(log_lik)
    sites = tuple(_site(n, node, joined[n], dens[n]) for n, node in nodes.items())
    return Predictions(sites, None, num_draws, local)


def _shared(runner: Runner, rows: int) -> tuple[str, ...]:
    return runner.shared(runner.latent, rows)


def _latents(runner: Runner, num_draws: int, common: list[str]) -> Iterator[tuple[Any, int]]:
    """Traces of the common latents to replay against; one by one where programs can't batch."""
    for part in runner.runs(num_draws):
        latents, count = part.latents, part.num
        if runner.plan.mapped and count > 1:
            for k in range(count):
                one = particle_slice(latents, runner.guide_trace, k, runner.plan.nesting)
                yield subset(one, common, indices=False), 1
        else:
            yield subset(latents, common, indices=False), count


def _unobserved(trace: Any) -> Any:
    """All latents of a run of the model."""
    names = [n for n, node in sample_nodes(trace).items() if not node["is_observed"]]
    return subset(trace, names)


def _drawn(node: Mapping, single: Mapping, count: int) -> Tensor:
    return with_draws(node["value"], count, single["value"].shape)


def _batch(node: Mapping) -> torch.Size:
    return node["fn"].batch_shape


def _site(name: str, node: Mapping, draws: Tensor, log_lik: Tensor | None) -> Predicted:
    fn, value, mask = node["fn"], node["value"], node["mask"]
    batch = value.shape[: value.dim() - fn.event_dim]
    valid = torch.ones(batch, dtype=torch.bool, device=value.device)
    for each in (mask, getattr(fn, "_mask", None)):
        if each is not None:
            valid = valid & torch.as_tensor(each, device=value.device)
    if log_lik is not None and log_lik.shape[1:] != batch:
        log_lik = None  # several data share a discrete latent, and one density
    if bool(value[valid].isnan().any()):
        raise DataError(
            f"site '{name}' has observations that are NaN and not masked out: leave them out with "
            "obs_mask= or poutine.mask"
        )
    return Predicted(name, fn, value, valid, draws, log_lik)


def affordable(trace: Any, names: Any, num_draws: int) -> int:
    """At most so many draws, fewer where their predictions would fill the memory.

    Raises:
        DataError: not even 50 fit.
    """
    nodes = sample_nodes(trace)
    size = sum(nodes[n]["value"].numel() for n in names)
    most = MEMORY // max(size, 1)
    if most < 50:
        raise DataError(
            f"the observed sites have {size:,} numbers, of which not even 50 predictions fit in "
            "memory. Check a random part of the rows: data=(x[rows], y[rows])."
        )
    return min(num_draws, most)


def read(posterior: Any, data: Any, args: Any, kwargs: Any) -> Data:
    """`data=` as in `pvi.fit`, with the posterior's own constants where none are given."""
    args = posterior.data.args if args is None else args
    kwargs = posterior.data.kwargs if kwargs is None else kwargs
    return as_data(data, args, kwargs, posterior.model)
