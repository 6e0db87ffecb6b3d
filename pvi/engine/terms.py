"""From sites to terms: per site, how much it adds to the log weight and how that was computed.

For latent site $s$ with particles $k$ and plates: $\\log p_s - \\log q_s$ by Monte Carlo, or
$-\\mathrm{KL}(q_s \\| p_s)$ in closed form; for an observed one $\\log p_s$. All in nats.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvi.engine.traces import (
    PARTICLES,
    Density,
    Plate,
    Scale,
    Site,
    is_certain,
    is_delta,
    masked,
    plates_of,
)
from pvi.errors import ModelError

Kind = Literal["likelihood", "latent", "auxiliary", "analytic", "penalty"]
Weight = Callable[["Term"], float | Tensor]


@dataclass(frozen=True)
class Term:
    """One site's part of the log weight; tensors are `(K, *batch)`, masked, and without any scale.

    Args:
        kind: "analytic" is a `pvi.kl`, "penalty" a `pvi.penalty` (its value is `kl`).
        log_p, log_q: log densities under the model and the guide; `None` where the site is absent.
        kl: the exact, already scaled divergence where one was used, else `None`.
        scale_p, scale_q: the user's `poutine.scale` on either side.
        how: how its divergence is computed: "exact", "sample", or why it fell back to sampling.
        reparameterized, point: whether the guide's draw can be differentiated, or is a Delta.
        sites: what the programs said, one entry a run: one for a batch of particles, else K.
    """

    name: str
    kind: Kind
    plates: tuple[Plate, ...]
    subsample_scale: float
    log_p: Tensor | None
    log_q: Tensor | None
    kl: Tensor | None
    scale_p: Scale
    scale_q: Scale
    how: str
    reparameterized: bool
    point: bool = False
    sites: tuple[Site, ...] = ()

    @property
    def certain(self) -> bool:
        """Whether the guide has but one value there, see `is_certain`."""
        return any(is_certain(site.q.fn) for site in self.sites if site.q is not None)

    @property
    def tensor(self) -> Tensor:
        """One of its tensors, the KL first; they have one shape."""
        return next(x for x in (self.kl, self.log_q, self.log_p) if x is not None)

    def guide_density(self) -> Tensor:
        """`log_q` of a site that the guide has."""
        if self.log_q is None:
            raise ValueError(f"site '{self.name}' has no density in the guide")
        return self.log_q

    def log_ratio(self, weight: float | Tensor = 1.0, *, scaled: bool = True) -> Tensor:
        """Its addend to the log weight, `(K, *batch)`, with its KL times `weight` (beta).

        `scaled=False` leaves the user's scales out: for a scale that multiplies the whole bound.
        """
        if self.kl is not None:
            return -times(self.kl, weight)
        ratio: Tensor | None = None
        if self.log_p is not None:
            ratio = times(self.log_p, self.scale_p) if scaled else self.log_p
        if self.log_q is not None:
            log_q = times(self.log_q, self.scale_q) if scaled else self.log_q
            ratio = -log_q if ratio is None else ratio - log_q
        if ratio is None:
            raise ValueError(f"site '{self.name}' has no density")
        return ratio if self.kind == "likelihood" else times(ratio, weight)

    def per_particle(self, weight: float | Tensor = 1.0) -> Tensor:
        """`log_ratio` summed over plates, subsampled ones scaled up to their full size: `(K,)`."""
        if isinstance(weight, Tensor) or weight != 1.0:
            return self._summed(weight)
        if torch.is_grad_enabled():
            return self._unweighted
        known = self.__dict__.get("_unweighted")
        return self._summed(1.0) if known is None else known.detach()

    @cached_property
    def _unweighted(self) -> Tensor:
        """With gradients; for the loss and for what is recorded of it."""
        return self._summed(1.0)

    def _summed(self, weight: float | Tensor) -> Tensor:
        ratio = self.log_ratio(weight)
        total = ratio if ratio.dim() == 1 else ratio.reshape(len(ratio), -1).sum(1)
        return times(total, self.subsample_scale)

    def log_q_per_particle(self) -> Tensor:
        """The guide's scaled log density summed over plates, 0 at observed sites: `(K,)`."""
        if self.log_q is None:
            return torch.zeros_like(self.per_particle())
        log_q = self.log_q * self.scale_q
        return self.subsample_scale * log_q.reshape(len(log_q), -1).sum(1)


@dataclass(frozen=True)
class Terms:
    """All terms of a model and a guide, in the model's order; penalties are no part of a bound."""

    items: tuple[Term, ...]
    penalties: tuple[Term, ...] = ()

    def __iter__(self) -> Iterator[Term]:
        return iter(self.items)

    def __getitem__(self, name: str) -> Term:
        for term in self.items:
            if term.name == name:
                return term
        raise KeyError(name)

    @property
    def num_particles(self) -> int:
        return len(self.items[0].tensor)

    def log_likelihood(self) -> Tensor:
        """Sum of the observed sites' log densities, `(K,)`, nats."""
        return self._total([t.per_particle() for t in self if t.kind == "likelihood"])

    def kl(self) -> dict[str, Tensor]:
        """Each latent site's KL (exact or sampled), averaged over particles; nats, unweighted."""
        return {t.name: -t.per_particle().mean() for t in self if t.kind != "likelihood"}

    def log_weights(self, weight: Weight = lambda term: 1.0) -> Tensor:
        """Joint log weights $\\log p(x, z) - \\log q(z)$, `(K,)`, nats.

        Args:
            weight: what each term's KL is multiplied by; with it, their mean is that of an ELBO.
        """
        if not self.items:
            raise ModelError("the model has no sample site and no pvi.kl, so there is no bound")
        total = self.items[0].per_particle(weight(self.items[0]))
        for term in self.items[1:]:
            total = total + term.per_particle(weight(term))
        return total

    def penalty(self) -> Tensor:
        """Sum of the `pvi.penalty` values, `(K,)`; it is minimised."""
        return self._total([-t.per_particle() for t in self.penalties])

    def _total(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0) if parts else torch.zeros(self.num_particles)


def times(x: Tensor, factor: Scale) -> Tensor:
    """The product; a factor that is the number 1 costs nothing."""
    return x * factor if isinstance(factor, Tensor) or factor != 1.0 else x


def make_terms(
    sites: list[Site],
    exact: Mapping[str, str],
    num_particles: int,
    nesting: int | None,
    effects: Sequence[Mapping] = (),
) -> Terms:
    """Turn paired sites of one run into `Terms`.

    Args:
        exact: for each latent, "exact" to use a closed form if there is one, else why not.
        nesting: number of plate dimensions under the particle plate; `None` if run without one.
        effects: messages of `pvi.kl` and `pvi.penalty` in that run.
    """

    def lead(x: Tensor) -> Tensor:
        if nesting is None:
            return x.unsqueeze(0)
        x = x.reshape((1,) * (nesting + 1 - x.dim()) + x.shape)
        return x.expand(num_particles, *x.shape[1:])

    def leader(site: Site) -> Callable[[Tensor], Tensor]:
        mean = site.average
        return lead if mean is None else lambda x: lead(mean(x))

    terms = [_term(site, exact.get(site.name, "sample"), leader(site)) for site in sites]
    more = [_effect(message, lead) for message in effects]
    _check_names([term.name for term in [*terms, *more]])
    penalties = tuple(term for term in more if term.kind == "penalty")
    return Terms((*terms, *(t for t in more if t.kind == "analytic")), penalties)


def _check_names(names: list[str]) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ModelError(
            f"'{twice[0]}' names two things; give each site, pvi.kl and pvi.penalty its own name."
        )


def _effect(message: Mapping, lead: Callable[[Tensor], Tensor]) -> Term:
    """A `pvi.kl` or `pvi.penalty` as a term, scaled and masked as its plates say."""
    analytic, plates = message["kind"] == "kl", plates_of(message)
    value = _filling(message)
    subsample = math.prod(plate.scale for plate in plates)
    scaled = masked(value, message["mask"]) * (message["scale"] / subsample)
    return Term(
        name=message["name"],
        kind="analytic" if analytic else "penalty",
        plates=plates,
        subsample_scale=subsample,
        log_p=None,
        log_q=None,
        kl=lead(scaled),
        scale_p=1.0,
        scale_q=1.0,
        how="exact" if analytic else "penalty",
        reparameterized=True,
    )


def _filling(message: Mapping) -> Tensor:
    """The value of an effect, one for each element of the plates around it."""
    frames = {f.dim: f for f in message["cond_indep_stack"] if f.dim is not None}
    value, kind = message["value"], message["kind"]
    shape = [frames[d].size if d in frames else 1 for d in range(min(frames, default=0), 0)]
    own = [frames[d].size for d in frames if frames[d].name != PARTICLES]
    try:
        full = value.expand(shape)
    except RuntimeError:
        full = None
    if full is None or (kind == "penalty" and math.prod(own) > max(value.numel(), 1)):
        known = {f.name: f.size for f in frames.values() if f.name != PARTICLES}
        raise ModelError(
            f"pvi.{kind} '{message['name']}' has a value of shape {tuple(value.shape)}, but the "
            f"plates around it are {known or 'none'}. Give one value for each of their elements, "
            "or move it out of the plates."
        )
    return full


def _term(site: Site, how: str, lead) -> Term:
    kind: Kind = "likelihood" if site.observed else "auxiliary" if site.p is None else "latent"
    kl = None
    if kind == "latent" and how == "exact":
        kl = exact_kl(site)
        how = "sample: no closed form" if kl is None else "exact"
    reparameterized = site.q is None or bool(getattr(site.q.fn, "has_rsample", False))
    log_p = None if site.p is None or kl is not None else lead(_log_prob(site.name, site.p))
    log_q = None
    if site.q is not None and (kl is None or _needs_score(site.q)):
        log_q = lead(_log_prob(site.name, site.q))
    return Term(
        name=site.name,
        kind=kind,
        plates=site.plates,
        subsample_scale=site.subsample_scale,
        log_p=log_p,
        log_q=log_q,
        kl=None if kl is None else lead(kl),
        scale_p=1.0 if site.p is None else site.p.scale,
        scale_q=1.0 if site.q is None else site.q.scale,
        how="" if kind == "likelihood" else how if kind == "latent" else "sample",
        reparameterized=reparameterized,
        point=site.q is not None and is_delta(site.q.fn),
        sites=(site,),
    )


def _needs_score(side: Density) -> bool:
    """Whether a draw carries no gradient, so that only its density can tell one."""
    return torch.is_grad_enabled() and not side.value.requires_grad


def _log_prob(name: str, side: Density) -> Tensor:
    log_prob = side.log_prob()
    if log_prob.shape != side.fn.batch_shape:
        raise ModelError(
            f"site '{name}' has values of shape {tuple(side.value.shape)}, which do not fit its "
            f"plates and distribution of shape {tuple(side.fn.shape())}. A column (N, 1) needs "
            ".squeeze(-1)."
        )
    return log_prob


def exact_kl(site: Site) -> Tensor | None:
    """Scaled KL(q || p) of a latent site in closed form, or `None` if there is none.

    With scales $s_q, s_p$ (masks are scales of 0 and 1) the objective needs
    $s_q E_q \\log q - s_p E_q \\log p = s_p KL(q \\| p) + (s_p - s_q) H(q)$.
    """
    p, q = site.p, site.q
    if p is None or q is None or is_delta(q.fn):  # the closed form drops a Delta's log_density
        return None
    try:
        kl = kl_divergence(q.fn, p.fn)
    except NotImplementedError:
        return None
    shape = q.fn.batch_shape
    kl = kl.expand(shape) if kl.dim() <= len(shape) else kl
    p_scale, q_scale = coefficient(p), coefficient(q)
    if _same(p_scale, q_scale) or (_same(p.scale, q.scale) and p.mask is q.mask):
        return kl * p_scale
    try:
        entropy = q.fn.entropy()
    except NotImplementedError:
        return None
    return kl * p_scale + (p_scale - q_scale) * entropy


def coefficient(side: Density) -> Scale:
    """The user's scale times the mask."""
    if side.mask is None or side.mask is True:
        return side.scale
    return side.scale * (side.mask if isinstance(side.mask, Tensor) else 0.0)


def _same(a: Scale, b: Scale) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b


def concatenate(runs: list[Terms]) -> Terms:
    """Stack the terms of single-particle runs along the particle dimension."""

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return torch.cat(present) if present else None

    def join(groups: Iterable[tuple[Term, ...]]) -> tuple[Term, ...]:
        items = []
        for group in groups:
            parts = {key: cat([getattr(t, key) for t in group]) for key in ("log_p", "log_q", "kl")}
            sites = tuple(site for term in group for site in term.sites)
            items.append(replace(group[0], **parts, sites=sites))
        return tuple(items)

    return Terms(
        join(zip(*(r.items for r in runs), strict=True)),
        join(zip(*(r.penalties for r in runs), strict=True)),
    )
