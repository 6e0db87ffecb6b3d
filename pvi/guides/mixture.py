"""A mixture of guides."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.guide import Guide
from pvi.guides.init import InitLoc
from pvi.guides.layout import Layout
from pvi.guides.mean_field import MeanField
from pvi.guides.prototype import Latent

Past = dict[str, Any]


class Mixture(Guide):
    """$q(z) = \\sum_{j=1}^k \\pi_j\\, q_j(z)$: several modes, skewness, heavy tails.

    The ELBO takes a draw from every component and weighs them by $\\pi$ (stratified sampling):
    $\\sum_j \\pi_j E_{q_j}[\\log p(x, z) - \\log q(z)]$, so that the gradient reaches the weights
    too and no component dies for want of draws. A step costs k evaluations of the model. The
    choice is an auxiliary, enumerated site; the other sites have the mixture's own density, given
    the sites before. Divergences are by Monte Carlo, and only the ELBO can train it.

    Args:
        num_components: k >= 1.
        of: the family of the components: a guide class or a function that makes one without a
            model, such as `lambda: FullRank(init_scale=0.3)`; not one with a joint draw of its own.
        model, init_loc_fn: as in `Guide`.
        spread: standard deviation of the components' starts around `init_loc_fn`, in unconstrained
            space.

    Reference:
        Morningstar et al. 2021 (automatic differentiation variational inference with mixtures).
    """

    joint = True
    weights: Any  # PyroParam (k,)

    def __init__(
        self,
        num_components: int,
        of: Any = MeanField,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        *,
        spread: float = 1.0,
    ):
        super().__init__(model, init_loc_fn)
        if not isinstance(num_components, int) or num_components < 1:
            raise GuideError(f"num_components must be a whole number >= 1, got {num_components!r}")
        self.num_components, self.spread = num_components, spread
        self.components = PyroModule()
        for j in range(num_components):
            part = of()
            if not (isinstance(part, Guide) and part.sitewise):
                raise GuideError(
                    "Mixture's components must have a density of their own at each site: "
                    "MeanField, LowRank, FullRank, Structured or MatrixNormal; got "
                    f"{type(part).__name__}"
                )
            if part.init_loc_fn != "median":
                raise GuideError("give init_loc_fn to Mixture: its components start around it")
            setattr(self.components, f"component{j}", part)

    @property
    def _parts(self) -> list[Guide]:
        return [getattr(self.components, f"component{j}") for j in range(self.num_components)]

    def _build(self) -> None:
        self._layout = Layout(self.latents.values())
        start = self._layout.start()
        generator = torch.Generator().manual_seed(0)
        for part in self._parts:
            shift = torch.randn(
                start.shape, generator=generator, dtype=start.dtype, device="cpu"
            ).to(start)
            locs = self._layout.split(start + self.spread * shift)
            found = [replace(x, loc=locs[name]) for name, x in self.latents.items()]
            part.adopt(found, (), {})
        self.weights = PyroParam(
            start.new_full((self.num_components,), 1.0 / self.num_components), constraints.simplex
        )

    @property
    def _component_site(self) -> str:
        return f"_component_of_{next(iter(self.latents))}"

    def _begin(self, args: tuple, kwargs: Mapping) -> Past:
        """Choose a component."""
        weights: Tensor = self.weights
        marks: Any = {"is_auxiliary": True, "enumerate": "parallel"}
        with poutine.mask(mask=False):  # the density is the mixture's, whatever was chosen
            chosen = pyro.sample(self._component_site, dist.Categorical(weights), infer=marks)
        parts = [part._begin(args, kwargs) for part in self._parts]
        return {"parts": parts, "log_weights": weights.log(), "chosen": chosen}

    def _distribution(self, latent: Latent, past: Past) -> "Mixed":
        both = zip(self._parts, past["parts"], strict=True)
        parts = [part._distribution(latent, own) for part, own in both]
        rows, log_weights = len(latent.batch_shape), past["log_weights"]
        if log_weights.dim() > 1:
            padding = (1,) * (self._layout.nesting - rows)
            log_weights = log_weights.reshape((*log_weights.shape, *padding))
        past["mixed"] = Mixed(parts, log_weights, past["chosen"], rows, latent.support)
        return past["mixed"]

    def _passed(self, latent: Latent, value: Tensor, past: Past) -> None:
        """What this site's draw says of the component that it came from."""
        if latent.name == list(self.latents)[-1]:
            return
        log_probs = past["mixed"].component_log_probs(value)
        outer = log_probs.shape[: max(1, log_probs.dim() - self._layout.nesting)]
        log_probs = log_probs.reshape((*outer, -1)).sum(-1)
        past["log_weights"] = _aligned(past["log_weights"], log_probs.dim() - 1) + log_probs
        for part, own in zip(self._parts, past["parts"], strict=True):
            part._passed(latent, value, own)

    def mean(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not self.latents:
            self.setup(*args, **kwargs)
        means = [part.mean(*args, **kwargs) for part in self._parts]
        weights = self.weights.detach()
        stacked = {name: torch.stack([mean[name] for mean in means]) for name in self.latents}
        return {name: torch.tensordot(weights, x, dims=1) for name, x in stacked.items()}


class Mixed(TorchDistribution):
    """A mixture whose elements in a plate come from one component, told element by element.

    $q(z_i \\mid z_{<i})$ is a mixture with weights $\\propto \\pi_j\\,q_j(z_{<i})$.

    Args:
        parts: the components' distributions at a site.
        log_weights: of the components given the sites before, up to a constant, `(k, *outer)`.
        chosen: the component that draws come from; it may have all values at once.
        rows: how many rightmost batch dimensions are plates of the site.
    """

    has_rsample = True

    def __init__(
        self, parts: list[Any], log_weights: Tensor, chosen: Tensor, rows: int, support: Any
    ):
        self.parts, self.log_weights, self.chosen, self.rows = parts, log_weights, chosen, rows
        self._support = support
        shape = torch.broadcast_shapes(chosen.shape, *(part.batch_shape for part in parts))
        super().__init__(shape, parts[0].event_shape, validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: _size, _instance: object = None) -> "Mixed":
        parts = [part.expand(torch.Size(batch_shape)) for part in self.parts]
        return Mixed(parts, self.log_weights, self.chosen, self.rows, self._support)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        chosen = self.chosen.reshape((*self.chosen.shape, *(1,) * len(self.event_shape)))
        draws = [part.expand(self.batch_shape).rsample(sample_shape) for part in self.parts]
        found = draws[0]
        for j, draw in enumerate(draws[1:], 1):
            found = torch.where(chosen == j, draw, found)
        return found

    def component_log_probs(self, value: Tensor) -> Tensor:
        """Log density of a value under each component, `(k, *batch)`."""
        found = torch.broadcast_tensors(*(part.log_prob(value) for part in self.parts))
        return torch.stack(found)

    def log_prob(self, value: Tensor) -> Tensor:
        log_probs = self.component_log_probs(value)
        outer = log_probs.shape[: log_probs.dim() - self.rows]
        flat = log_probs.reshape((*outer, -1))
        before = _aligned(self.log_weights, len(outer) - 1).unsqueeze(-1) + flat.cumsum(-1) - flat
        found = (before + flat).logsumexp(0) - before.logsumexp(0)
        return found.reshape(log_probs.shape[1:])


def _aligned(log_weights: Tensor, dims: int) -> Tensor:
    """`(k, *outer)` with so many dimensions after the first."""
    missing = dims - (log_weights.dim() - 1)
    return log_weights.reshape(len(log_weights), *(1,) * missing, *log_weights.shape[1:])
