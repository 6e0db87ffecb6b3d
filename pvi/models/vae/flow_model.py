"""A normalising flow of the data, with an exact density."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.types import _size

import pvi
from pvi.errors import DataError, ModelError
from pvi.guides.flow import make_flow
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.exact import ExactModel
from pvi.models.vae.flows import FlowDensity
from pvi.nn.mlp import Shape, as_shape


class FlowModel(ExactModel):
    """$\\log p(x) = \\log N(f(u); 0, I) + \\log|\\det \\partial f / \\partial u| - D \\log s$
    with $u = (x - m) / s$.

    For whole numbers 0, 1, ..., `levels` - 1 a density means nothing, as it can be as high as one
    likes at single points. Then the model is that of a continuous latent y with x = floor(y), and
    the guide is uniform on the cell of x ("uniform dequantisation"):

    $$\\log P(x) = \\log \\int_{[0,1)^D} p(x + v)\\,dv \\ge E_v[\\log p(x + v)]$$

    which is an ELBO like others: `pvi.IWAE` makes it tighter, and `score_samples` estimates the
    log probability by importance sampling.

    Args:
        shape: of a datum.
        kind: a class of `zuko.flows`: "MAF", "NSF", ...
        options: of it, such as `transforms=3`, `hidden_features=(64, 64)`.
        levels: how many whole numbers, for data of such; `None` for continuous data.
        loc, scale: m and s, numbers that bring data near a standard normal; by default 0 and 1, and
            for levels their middle and a quarter of their range.

    Reference:
        Theis, van den Oord, Bethge (2016), A note on the evaluation of generative models, eq. 4;
        Papamakarios et al. (2021), Normalizing Flows for Probabilistic Modeling and Inference.
    """

    zero: Tensor

    def __init__(
        self,
        shape: Shape,
        kind: str = "MAF",
        options: dict[str, Any] | None = None,
        *,
        levels: int | None = None,
        loc: float | None = None,
        scale: float | None = None,
    ):
        super().__init__()
        self.shape, self.kind, self.options = as_shape(shape), kind, dict(options or {})
        self.levels = levels
        if (levels is not None and levels < 2) or (scale is not None and not scale > 0):
            raise ModelError(f"needs levels >= 2 and scale > 0, got {levels}, {scale}")
        self.loc = (levels or 0.0) / 2 if loc is None else loc
        self.scale = (levels or 4.0) / 4 if scale is None else scale
        size = math.prod(self.shape)
        self.flow = make_flow(kind, size, 0, self.options)
        self.register_buffer("zero", torch.zeros(size), persistent=False)

    @property
    def density(self) -> Any:
        """p(y), event shape `(D,)`."""
        fn = FlowDensity(self.flow(None).transform, self.zero)
        change = dist.transforms.AffineTransform(self.loc, self.scale, event_dim=1)
        return dist.TransformedDistribution(fn, [change])

    def model(self, x: Tensor) -> None:
        self.registered()
        x = x.flatten(1)
        with pyro.plate("data", len(x)):
            if self.levels is None:
                pyro.sample("x", self.density, obs=x)
            else:
                y = pyro.sample("y", self.density)
                pyro.sample("x", dist.Delta(y.floor(), event_dim=1), obs=x)

    def guide(self, *rows: Tensor) -> None:
        self.registered()
        if self.levels is not None:
            x = rows[0].flatten(1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", Cell(x, x + 1.0).to_event(1))

    def log_density(self, x: Tensor) -> Tensor:
        return self.density.log_prob(x.flatten(1))

    def score_samples(self, X: Any, y: Any = None, **options: Any) -> pvi.Evidence:
        if self.levels is None:
            return super().score_samples(X, y, **options)
        return LatentVariableModel.score_samples(self, X, y, **options)

    def draws(self, num_samples: int) -> Tensor:
        y = self.density.sample((num_samples,)).reshape(num_samples, *self.shape)
        return y if self.levels is None else y.floor()

    def encode(self, X: Any, y: Any = None) -> Tensor:
        """The noise f(u) of each datum, of whole numbers that of their cell's centre: `(N, D)`."""
        half = 0.0 if self.levels is None else 0.5
        return self.in_batches(lambda x: self._transform(x.flatten(1) + half), self.data(X))

    def decode(self, z: Any, y: Any = None) -> Tensor:
        """Data from noise: the inverse of `encode`, `(N, *shape)`."""
        x = self.in_batches(self.flow(None).transform.inv, self.numbers(z, "z"))
        x = (self.loc + self.scale * x).reshape(-1, *self.shape)
        return x if self.levels is None else x.floor()

    def _transform(self, x: Tensor) -> Tensor:
        return self.flow(None).transform((x - self.loc) / self.scale)

    def check(self, x: Tensor) -> None:
        good = x.isfinite()
        if self.levels is not None:
            good = good & (x >= 0) & (x < self.levels) & (x == x.floor())
        if not bool(good.all()):
            whole = f"whole numbers from 0 to {(self.levels or 0) - 1}"
            want = "finite values" if self.levels is None else whole
            place = tuple((~good).nonzero()[0].tolist())
            raise DataError(
                f"this FlowModel needs {want}, but X{list(place)} is {float(x[place]):.4g}. Give "
                "levels= for whole numbers, or scale the data."
            )


class Cell(dist.Uniform):
    """A uniform distribution whose draws stay below the upper end when they are rounded."""

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        drawn = super().rsample(sample_shape)
        return torch.minimum(drawn, torch.nextafter(self.high, self.low))

    def expand(self, batch_shape: _size, _instance: Any = None) -> "Cell":
        shape = torch.Size(batch_shape)
        return Cell(self.low.expand(shape), self.high.expand(shape), validate_args=False)
