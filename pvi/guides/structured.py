"""Normals that depend on the sites before, with a covariance inside each element of a plate."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.constraints import unit_lower_cholesky
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.init import InitLoc
from pvi.guides.mean_field import NormalGuide, onto, unconstrained
from pvi.guides.normals import CholeskyNormal
from pvi.guides.prototype import Latent


class Structured(NormalGuide):
    """Normals in unconstrained space that follow the model's plates.

    Site $j$, in each element of its plates, with the noise $\\epsilon_i$ of the sites it depends
    on:

    $$u_j = m_j + s_j \\odot \\Big(\\sum_{i} A_{ji}\\,\\epsilon_i + T_j\\,\\epsilon_j\\Big),$$

    $T_j$ unit lower triangular. Everything with an index of a plate is a row of its own for each
    element, so the covariance is full within an element, elements are independent given the sites
    outside their plate, and minibatches reach just their rows. Each site is an ordinary normal,
    whose KL against a normal prior is exact given the sites before. It contains the posterior of
    every linear normal hierarchical model.

    Args:
        model, init_loc_fn, init_scale: as in `Guide`.
        depends_on: for each site the earlier ones that it depends on, whose plates must be among
            its own; sites that are not named depend on all of those. `{}` names none, `None` is
            the same; `depends_on={"z": []}` cuts z loose. A site of d numbers in a plate of N
            elements has $N d d_i$ parameters for each site i of $d_i$ numbers.

    Reference:
        Hoffman and Blei 2015 (structured VI); Tan and Nott 2018 (sparse precision by plates).
    """

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.1,
        *,
        depends_on: Mapping[str, Sequence[str]] | None = None,
    ):
        super().__init__(model, init_loc_fn, init_scale)
        self.depends_on = dict(depends_on or {})
        self.within = PyroModule()
        self.on = PyroModule()

    def _build(self) -> None:
        super()._build()
        self._empty("within", "on")
        self._check_names()
        names = list(self.latents)
        self.parents = {n: self._parents(n, names[:i]) for i, n in enumerate(names)}
        for name, latent in self.latents.items():
            size, batch = latent.event_shape.numel(), latent.batch_shape
            like = {"dtype": latent.loc.dtype, "device": latent.loc.device}
            if size > 1:
                eye = torch.eye(size, **like).expand(*batch, size, size).clone()
                setattr(self.within, latent.key, PyroParam(eye, unit_lower_cholesky, 2))
            for other in self.parents[name]:
                width = self.latents[other].event_shape.numel()
                zeros = torch.zeros(*batch, size, width, **like)
                key = self._key(latent, self.latents[other])
                setattr(self.on, key, PyroParam(zeros, constraints.real, 2))

    def _check_names(self) -> None:
        for name, parents in self.depends_on.items():
            for site in (name, *parents):
                if site not in self.latents:
                    raise GuideError(
                        f"depends_on names site '{site}', which is no latent of the model; they "
                        f"are {sorted(self.latents)}"
                    )

    def _parents(self, name: str, before: list[str]) -> list[str]:
        plates = {p.name for p in self.latents[name].plates}
        fit = [n for n in before if {p.name for p in self.latents[n].plates} <= plates]
        for other in self.depends_on.get(name, ()):
            if other not in fit:
                raise GuideError(
                    f"depends_on lets site '{name}' depend on '{other}', which must come before it "
                    f"in the model and be in no other plates; that holds for {fit or 'none'}"
                )
        return [n for n in fit if n in self.depends_on.get(name, fit)]

    @staticmethod
    def _key(latent: Latent, other: Latent) -> str:
        return f"{latent.key}|{other.key}"

    def _begin(self, args: tuple, kwargs: Mapping) -> dict[str, Any]:
        return {}

    def _shift(self, latent: Latent, noise: Mapping[str, Tensor]) -> Tensor:
        """What the sites before add to a site's noise, `(*batch, d)`."""
        shift = latent.loc.new_zeros(())
        for other in self.parents[latent.name]:
            weight = getattr(self.on, self._key(latent, self.latents[other]))
            shift = shift + (weight @ noise[other].unsqueeze(-1)).squeeze(-1)
        return shift

    def _distribution(self, latent: Latent, past: dict[str, Any]) -> Any:
        loc, scale = self._loc_scale(latent)
        if self.parents[latent.name]:
            shift = self._shift(latent, past)
            shift = shift.reshape((*shift.shape[:-1], *latent.event_shape))
            loc = loc + scale * shift
        if latent.event_shape.numel() == 1:
            fn = onto(latent, dist.Normal(loc, scale).to_event(latent.event_dim))
        else:
            tril = _vectors(latent, scale).unsqueeze(-1) * getattr(self.within, latent.key)
            fn = onto(latent, CholeskyNormal(loc, tril, latent.event_dim, latent.event_dim))
        past["fn"] = fn
        return fn

    def _passed(self, latent: Latent, value: Tensor, past: dict[str, Any]) -> None:
        if not any(latent.name in parents for parents in self.parents.values()):
            return
        normal, u = unconstrained(past["fn"], value)
        if isinstance(normal, CholeskyNormal):
            past[latent.name] = normal.whitened(u)
        else:
            past[latent.name] = _vectors(latent, (u - normal.mean) / normal.stddev)

    def _mixed(self, noise: Tensor) -> Tensor:
        parts, own = {}, self.layout.split(noise)
        white = {name: _vectors(latent, own[name]) for name, latent in self.latents.items()}
        for name, latent in self.latents.items():
            x = white[name]
            if x.shape[-1] > 1:
                x = (getattr(self.within, latent.key) @ x.unsqueeze(-1)).squeeze(-1)
            if self.parents[name]:
                x = x + self._shift(latent, white)
            parts[name] = x.reshape(len(noise), -1)
        return self.layout.join(parts)

    def _marginals(self, past: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, latent in self.latents.items():
            loc, scale = self._loc_scale(latent)
            own = torch.ones_like(_vectors(latent, scale))
            if own.shape[-1] > 1:
                own = getattr(self.within, latent.key).square().sum(-1)
            keys = [self._key(latent, self.latents[other]) for other in self.parents[name]]
            variance = own + sum(getattr(self.on, key).square().sum(-1) for key in keys)
            found[name] = loc, scale * variance.sqrt().reshape(scale.shape)
        return found


def _vectors(latent: Latent, x: Tensor) -> Tensor:
    """The numbers of each event as one vector, `(*batch, d)`."""
    return x.reshape((*x.shape[: x.dim() - latent.event_dim], -1))
