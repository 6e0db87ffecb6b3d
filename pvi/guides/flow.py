"""Normalising flows, by zuko."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.types import _size

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.init import InitLoc
from pvi.guides.layout import Layout
from pvi.guides.mean_field import LocScaleGuide
from pvi.guides.mode import pushed
from pvi.guides.prototype import Latent

Factory = Callable[[int, int], nn.Module]


def make_flow(kind: str | Factory, features: int, context: int, options: Mapping) -> nn.Module:
    """A flow of zuko's, by the name of its class or from a function of (features, context).

    Raises:
        GuideError: zuko is not installed, has no such flow, or does not take these options.
    """
    if not isinstance(kind, str):
        return kind(features, context)
    flows = _zuko_flows()
    if not isinstance(getattr(flows, kind, None), type):
        raise GuideError(
            f"zuko has no flow {kind!r}. Use 'NSF', 'MAF', 'NAF', 'CNF' or another class of "
            "zuko.flows, or give a function from (features, context) to a flow."
        )
    try:
        return getattr(flows, kind)(features, context, **options)
    except TypeError as error:
        raise GuideError(f"zuko's {kind} does not take {dict(options)}: {error}") from error


def _zuko_flows() -> Any:
    """zuko's flows; its import switches off the validation of all distributions: switch it back."""
    validate = Distribution._validate_args  # pyright: ignore[reportAttributeAccessIssue]
    try:
        import zuko.flows
    except ImportError as error:
        raise GuideError("flows need zuko: pip install 'pvi[flows]'") from error
    finally:
        Distribution.set_default_validate_args(validate)
    return zuko.flows


class FlowDistribution(TorchDistribution):
    """$u = m + s \\odot f(\\epsilon)$, $\\epsilon \\sim N(0, I)$, with zuko's transform $f$.

    The noise goes through $f$ in the direction that zuko computes at once for autoregressive flows
    too (inverse autoregressive flows, Kingma et al. 2016); the density of values that were not
    drawn here needs the other one.

    Args:
        transform: of vectors `(*batch, n)`.
        loc, scale: `(*batch, n)`.
    """

    has_rsample = True

    def __init__(self, transform: Any, loc: Tensor, scale: Tensor):
        loc, scale = torch.broadcast_tensors(loc, scale)
        self.transform, self.loc, self.scale = transform, loc, scale
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    def expand(self, batch_shape: _size, _instance: object = None) -> "FlowDistribution":
        shape = torch.Size(batch_shape) + self.event_shape
        return FlowDistribution(self.transform, self.loc.expand(shape), self.scale.expand(shape))

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        loc = self.loc.expand(torch.Size(sample_shape) + self.loc.shape)
        # zuko differentiates some transforms by their input: it must not be a leaf of its own
        noise = torch.randn_like(loc) + 0.0 * loc
        u, log_det = self.transform.call_and_ladj(noise)
        u = loc + self.scale * u
        self._drawn = u, self._density(noise, log_det)
        return u

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        noise = self.transform.inv((value - self.loc) / self.scale)
        return self._density(noise, self.transform.call_and_ladj(noise)[1])

    def _density(self, noise: Tensor, log_det: Tensor) -> Tensor:
        normal = -0.5 * (noise.square() + math.log(2.0 * math.pi)).sum(-1)
        return normal - log_det - self.scale.log().sum(-1)


class Flow(LocScaleGuide):
    """A normalising flow over all latents together, in unconstrained space.

    $$u = m + s \\odot f(\\epsilon), \\quad \\epsilon \\sim N(0, I), \\qquad
    \\log q(u) = \\log N(\\epsilon; 0, I) - \\log\\Big|\\det \\frac{\\partial u}
    {\\partial \\epsilon}\\Big|$$

    One joint draw stands behind all sites: it is an auxiliary site, and the model's sites restate
    it, so divergences are by Monte Carlo.

    Args:
        model, init_loc_fn, init_scale: as in `Guide`.
        kind: a class of `zuko.flows`: "NSF" (rational-quadratic splines; Durkan et al. 2019), "MAF"
            (affine; Papamakarios et al. 2017), "NAF" (Huang et al. 2018), "CNF" (continuous; Chen
            et al. 2018) ...; or a function from (features, context) to a flow.
        options: of that class, such as `transforms=3`, `hidden_features=(64, 64)`, and
            `passes=2` for coupling layers, fast in both directions.

    Raises:
        GuideError: zuko is missing, or the kind or its options do not exist.
    """

    joint = True
    sitewise = False

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.1,
        *,
        kind: str | Factory = "NSF",
        **options: Any,
    ):
        super().__init__(model, init_loc_fn, init_scale)
        self.kind, self.options = kind, options

    def _build(self) -> None:
        super()._build()
        self._layout = Layout(self.latents.values())
        start = self._layout.start()
        if "flow" in self._modules:
            del self.flow  # from Pyro's store too, whose weights would be trained instead
        self.flow = make_flow(self.kind, self._layout.size, 0, self.options).to(start)

    @property
    def _joint(self) -> FlowDistribution:
        pairs = [self._loc_scale(latent) for latent in self.latents.values()]
        loc, scale = (torch.cat([x.reshape(-1) for x in part]) for part in zip(*pairs, strict=True))
        return FlowDistribution(self.flow(None).transform, loc, scale)

    def _begin(self, args: tuple, kwargs: Mapping) -> dict[str, Tensor]:
        """One draw of everything."""
        name = f"_flow_of_{next(iter(self.latents))}"
        vector = pyro.sample(name, self._joint, infer={"is_auxiliary": True})
        nesting = self._layout.nesting
        if vector.dim() > 1:  # (*particles, 1, ..., 1, n): its batch covers the plates of all sites
            outer = vector.shape[: max(0, vector.dim() - 1 - nesting)]
            vector = vector.reshape((*outer, vector.shape[-1]))
        return self._layout.split(vector)

    def _distribution(self, latent: Latent, past: dict[str, Tensor]) -> Any:
        return pushed(latent, past[latent.name])

    def _infer(self, latent: Latent) -> dict[str, Any]:
        return {"follows_mask": False}  # its density is that of the joint draw, of all elements

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._require_setup()
        padded = {name: self._padded(latent, values[name]) for name, latent in self.latents.items()}
        parts, total = {}, torch.zeros(())
        for name, latent in self.latents.items():
            u = latent.unconstrained(padded[name])
            log_q: Any = pushed(latent, u).log_density
            total = total + log_q.reshape(len(u), -1).sum(1)
            parts[name] = self._layout.flat(latent, u)
        return total + self._joint.log_prob(self._layout.join(parts))

    def _marginals(self, past: Any) -> dict[str, tuple[Tensor, Tensor]]:
        return {}
