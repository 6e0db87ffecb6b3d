"""How each KL is weighted: a number, one for each site, a schedule, or a rule.

A rule (`FreeBits`, `Capacity`, `BetaTC`) replaces the KLs of the sites it covers by a cost of their
means over the batch. A mean is needed before the rule applies, so the cost of a minibatch is not an
unbiased estimate of that of all data. Rules belong to the ELBO, and never enter `.bound()`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvi.engine.schedules import Schedule
from pvi.engine.terms import Term, Terms, coefficient
from pvi.engine.traces import Density, Site, flat_events
from pvi.errors import ObjectiveError

Number = float | Schedule
Beta = Number | Mapping[str, Number]
Cost = tuple[Tensor, dict[str, Tensor]]  # a scalar, nats, and what there is to record, by name


class Rule(Protocol):
    """What replaces the weighted KLs of some sites."""

    exact: bool  # whether it needs closed-form KLs
    sampled: bool  # whether it needs sampled ones

    def covers(self, terms: Terms) -> list[Term]:
        """The terms whose KL the rule replaces."""
        ...

    def cost(self, found: list[Term]) -> Cost:
        """What is subtracted from the bound in the place of the terms covered."""
        ...


@dataclass(frozen=True)
class FreeBits:
    """KL below a floor costs the same as the floor, so it is free (Kingma et al. 2016, eq. 15).

    $$\\mathrm{cost} = N \\sum_g \\max\\{\\lambda, \\mathrm{mean}\\, KL_g\\}$$
    over groups g; the mean is over the batch (all plates of the site) and the particles.

    Args:
        nats: lambda, for each group and element of the plates; a number or a schedule.
        per: "site" (one group), "dimension" (each scalar of an event; q and p must both
            factorise), or a number of groups of consecutive dimensions.
        sites: names of the sites; by default all latents. Each needs a closed-form KL.

    Raises:
        ObjectiveError: a site has no exact KL, or does not factorise.
    """

    nats: Number
    per: Literal["site", "dimension"] | int = "site"
    sites: Sequence[str] | None = None
    exact, sampled = True, False

    def __post_init__(self) -> None:
        check_numbers(nats=self.nats)
        whole = isinstance(self.per, int) and not isinstance(self.per, bool) and self.per >= 1
        if not (whole or self.per in ("site", "dimension")):
            raise ObjectiveError(
                f"per must be 'site', 'dimension' or a number of groups, got {self.per!r}"
            )

    def covers(self, terms: Terms) -> list[Term]:
        found = _named(terms, self.sites, "free bits")
        for term in found:
            if term.kl is None:
                raise ObjectiveError(
                    f"free bits need an exact KL, but that of site '{term.name}' is sampled "
                    f"({term.how}). Name the other sites with sites=, or change its distributions."
                )
        return found

    def cost(self, found: list[Term]) -> Cost:
        return torch.stack([self._site(term) for term in found]).sum(), {}

    def _site(self, term: Term) -> Tensor:
        kl = term.tensor.unsqueeze(-1) if self.per == "site" else self._by_group(term)
        kl = kl.reshape(len(kl), -1, kl.shape[-1])
        total = kl.sum(1).mean(0)  # over plates, then particles: (groups,)
        floor = _float(self.nats) * _elements(term)
        return term.subsample_scale * torch.maximum(total, floor.expand_as(total)).sum()

    def _by_group(self, term: Term) -> Tensor:
        """Scaled KL of each group, `(K, *batch, groups)`."""
        kl = by_run(term, _kl_by_dimension)
        size, groups = kl.shape[-1], kl.shape[-1] if self.per == "dimension" else int(self.per)
        if size % groups:
            raise ObjectiveError(
                f"free bits for {groups} groups: the {size} dimensions of site '{term.name}' don't "
                "divide into groups of equal size."
            )
        return kl.unflatten(-1, (groups, size // groups)).sum(-1)


@dataclass(frozen=True)
class Capacity:
    """Hold the KL of a datum at a capacity (Burgess et al. 2018).

    $$\\mathrm{cost} = N \\gamma\\, |\\mathrm{mean}\\, KL - C|$$

    Args:
        nats: C, for each element of the latents' plates; a number or a schedule.
        gamma: the price of a nat.
        sites: names of the sites whose KLs are added up; by default all latents.

    Raises:
        ObjectiveError: the sites are in different plates.
    """

    nats: Number
    gamma: Number = 1.0
    sites: Sequence[str] | None = None
    exact, sampled = False, False

    def __post_init__(self) -> None:
        check_numbers(nats=self.nats, gamma=self.gamma)

    def covers(self, terms: Terms) -> list[Term]:
        found = _named(terms, self.sites, "capacity")
        for term in found[1:]:
            if {p.name for p in term.plates} != {p.name for p in found[0].plates}:
                raise ObjectiveError(
                    f"capacity adds up the KLs of one datum, but sites '{found[0].name}' and "
                    f"'{term.name}' are in different plates. Name those of one plate with sites=."
                )
        return found

    def cost(self, found: list[Term]) -> Cost:
        scale = found[0].subsample_scale
        kl = torch.stack([-t.per_particle() for t in found]).sum(0).mean()
        number = scale * torch.stack([_elements(t) for t in found]).max()
        return _float(self.gamma) * (kl - _float(self.nats) * number).abs(), {}


@dataclass(frozen=True)
class BetaTC:
    """Weight the parts of one latent's KL apart (Chen, Li, Grosse, Duvenaud 2018, eq. 2 and 4).

    $$KL = \\underbrace{E \\log \\frac{q(z|x)}{q(z)}}_{\\text{index-code mutual information}}
    + \\underbrace{E \\log \\frac{q(z)}{\\prod_d q(z_d)}}_{\\text{total correlation}}
    + \\underbrace{\\sum_d E \\log \\frac{q(z_d)}{p(z_d)}}_{\\text{dimension-wise KL}}$$
    They add up to the sampled KL of the same draws exactly. The aggregate posterior
    $q(z) = \\frac1N \\sum_j q(z | x_j)$ is estimated from the batch, the own datum with weight 1/N
    and each other one with $(N-1) / (N (B-1))$: stratified, rows add up to 1, and exact where the
    batch is the whole. Its logarithm is biased low by Jensen's inequality in smaller batches.

    Args:
        beta: weight of the total correlation.
        mutual_information, dimension_wise: weights of the other parts.
        site: name of the latent; may be left out where there is one only.

    Raises:
        ObjectiveError: the site is not in exactly one plate, is scaled or masked, or does not
            factorise.
    """

    beta: Number
    mutual_information: Number = 1.0
    dimension_wise: Number = 1.0
    site: str | None = None
    exact, sampled = False, True

    def __post_init__(self) -> None:
        check_numbers(
            beta=self.beta,
            mutual_information=self.mutual_information,
            dimension_wise=self.dimension_wise,
        )

    def covers(self, terms: Terms) -> list[Term]:
        found = _named(terms, None if self.site is None else [self.site], "beta-TC")
        if len(found) > 1:
            raise ObjectiveError(
                f"beta-TC takes one latent apart, but there are {[t.name for t in found]}. Choose "
                "with site=."
            )
        return found

    def cost(self, found: list[Term]) -> Cost:
        """The weighted sum of the parts, and each of them, of all data."""
        (term,) = found
        _check_decomposable(term)
        joint, by_dimension, prior = (
            term.subsample_scale * x.mean()
            for x in by_run(term, _aggregate, batch=False).unbind(-1)
        )
        log_q = term.log_q_per_particle().mean()
        parts = {
            "mutual_information": log_q - joint,
            "total_correlation": joint - by_dimension,
            "dimension_wise_kl": by_dimension - prior,
        }
        weights = (self.mutual_information, self.beta, self.dimension_wise)
        weighted = [_float(w) * x for w, x in zip(weights, parts.values(), strict=True)]
        return torch.stack(weighted).sum(), parts


def site_weights(beta: Beta, terms: Terms) -> dict[str, float]:
    """Each latent's beta.

    Raises:
        ObjectiveError: a name that is no latent; a schedule, which needs a time.
    """
    names = [t.name for t in terms if t.kind != "likelihood"]
    if not isinstance(beta, Mapping):
        return {name: _float(beta) for name in names}
    unknown = set(beta) - set(names)
    if unknown:
        raise ObjectiveError(
            f"beta names {sorted(unknown)}, which are no latent sites. The latents are {names}."
        )
    return {name: _float(beta.get(name, 1.0)) for name in names}


def _float(value: Any) -> Any:
    """A weight as a number; one that is a tensor, as in a compiled step, stays one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Schedule):
        raise ObjectiveError(
            f"the weight '{value}' needs to know the time: pvi.fit tells it, elsewhere use "
            "objective.at(step=..., epoch=...)"
        )
    return float(value)


def schedules_in(value: Any) -> Iterator[Schedule]:
    """All schedules in a number, a dict of numbers or a rule."""
    if isinstance(value, Schedule):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, Schedule))
    elif is_dataclass(value):
        yield from schedules_in(vars(value))


def filled(value: Any, number: Callable[[Schedule], Any]) -> Any:
    """The same with each schedule replaced by what a function makes of it."""
    if isinstance(value, Schedule):
        return number(value)
    if isinstance(value, Mapping):
        return {key: filled(v, number) for key, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        found = {name: x for name, x in vars(value).items() if isinstance(x, Schedule)}
        return replace(value, **filled(found, number))
    return value


def check_beta(beta: Beta) -> None:
    """Refuse weights that are none."""
    weights = beta if isinstance(beta, Mapping) else {"": beta}
    for name, weight in weights.items():
        check_numbers(**{f"beta['{name}']" if name else "beta": weight})


def check_numbers(**numbers: Any) -> None:
    """Refuse weights that are no number >= 0 and no schedule."""
    for name, value in numbers.items():
        plain = isinstance(value, float | int) and not isinstance(value, bool)
        later = isinstance(value, Schedule | Tensor)
        if not later and not (plain and 0 <= value < math.inf):
            raise ObjectiveError(
                f"{name} must be a finite number >= 0 or one of pvi.schedules, got {value!r}"
            )


def by_run(term: Term, function: Callable[[Site], Tensor], batch: bool = True) -> Tensor:
    """`function` of each run's site, particles first: `(K, *batch, D)` or, summed, `(K, D)`."""
    parts = [function(site) for site in term.sites]
    shape = term.tensor.shape if batch else term.tensor.shape[:1]
    own = (shape[0] // len(parts), *shape[1:])  # particles of one run
    return torch.cat([x.expand(*own, x.shape[-1]) for x in parts])


def _named(terms: Terms, names: Sequence[str] | None, what: str) -> list[Term]:
    """The latent terms of these names, or all latents; at least one."""
    if isinstance(names, str) or (names is not None and not names):
        raise ObjectiveError(f"{what}: sites must be a list of names, got {names!r}")
    latents = {t.name: t for t in terms if t.kind == "latent"}
    point = [t.name for t in latents.values() if t.point and (names is None or t.name in names)]
    if point:
        raise ObjectiveError(
            f"{what}: the guide puts a Delta at site '{point[0]}', which has no KL of its own. Use "
            "a guide that draws the site itself, or name other sites."
        )
    unknown = sorted(set(names or ()) - latents.keys())
    if unknown or not latents:
        raise ObjectiveError(
            f"{what}: {unknown or 'nothing'} to apply it to; the latent sites are {list(latents)}."
        )
    return [t for name, t in latents.items() if names is None or name in names]


def _elements(term: Term) -> Tensor:
    """The number of elements of a site's plates, scaled and masked as the site is; a scalar."""
    ours, theirs = map(coefficient, _sides(term.sites[0]))
    if not torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)):
        raise ObjectiveError(
            f"site '{term.name}' is scaled or masked differently in model and guide, so its mean "
            "KL over the batch is not defined. Use the same poutine.scale and mask in both."
        )
    counted = (term.tensor.new_ones(()) * ours).expand(term.tensor.shape)
    return counted.reshape(len(counted), -1).sum(1).mean(0)


def _sides(site: Site) -> tuple[Density, Density]:
    """What model and guide say of a latent site."""
    if site.p is None or site.q is None:
        raise ObjectiveError(f"site '{site.name}' has no prior, so it has no KL")
    return site.p, site.q


def _kl_by_dimension(site: Site) -> Tensor:
    """Scaled KL of each scalar of an event: `(*batch, D)`."""
    p, q = _sides(site)
    kl = kl_divergence(_factors(site.name, q.fn), _factors(site.name, p.fn))
    kl = kl.expand(q.fn.batch_shape + q.fn.event_shape)
    kl = kl.reshape(*q.fn.batch_shape, -1)
    scale = coefficient(p)
    return kl * (scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale)


def _factors(name: str, fn: Any) -> Any:
    """The distribution of the scalars of an event, if they are independent."""
    base = flat_events(fn)
    if base is None:
        raise ObjectiveError(
            f"the dimensions of site '{name}' are not independent under its {type(fn).__name__}, "
            "so they have no KLs of their own. Use independent distributions with .to_event(...) "
            "in model and guide."
        )
    return base


def _check_decomposable(term: Term) -> None:
    plates = [p for p in term.plates if p.dim is not None]
    if len(plates) != 1 or plates[0].size < 2:
        raise ObjectiveError(
            f"beta-TC needs site '{term.name}' in one plate, that of the data, with at least two "
            f"rows; it is in {[f'{p.name} ({p.size})' for p in term.plates] or 'none'}."
        )
    for side in _sides(term.sites[0]):
        if isinstance(side.scale, Tensor) or side.scale != 1.0 or side.mask is not None:
            raise ObjectiveError(f"beta-TC: site '{term.name}' must not be scaled or masked")
        _factors(term.name, side.fn)


def stratified_log_weights(size: int, batch: int) -> Tensor:
    """Log weights `(B, B)` of $q(z_i | x_j)$ in the estimate of $q(z_i)$; rows add up to 1."""
    weights = torch.full((batch, batch), (size - 1) / (size * (batch - 1)))
    return weights.fill_diagonal_(1 / size).log()


def _aggregate(site: Site) -> Tensor:
    """Sums over the batch of log q(z), sum_d log q(z_d) and sum_d log p(z_d): `(K or none, 3)`."""
    p, q = _sides(site)
    ((plate, batch_dim),) = ((x, x.dim) for x in site.plates if x.dim is not None)
    factors, z = _factors(site.name, q.fn), q.value
    dim = batch_dim - len(q.fn.event_shape)
    pairs = factors.log_prob(z.movedim(dim, 0).unsqueeze(dim))  # (i, K?, j, ..., *event)
    pairs = pairs.flatten(start_dim=pairs.dim() + dim + 1) if dim < -1 else pairs.unsqueeze(-1)
    weights = stratified_log_weights(plate.full_size, plate.size).to(pairs)
    weights = weights.reshape(plate.size, *[1] * (pairs.dim() - 3), plate.size, 1)
    joint = torch.logsumexp(weights[..., 0] + pairs.sum(-1), -1)  # (i, K?)
    single = torch.logsumexp(weights + pairs, -2).sum(-1)
    prior = p.fn.log_prob(z)
    prior = prior.flatten(start_dim=prior.dim() + batch_dim).sum(-1)
    return torch.stack([joint.sum(0), single.sum(0), prior.expand(joint.shape[1:])], -1)
