"""`bayesianize`: any module as a Pyro model with random weights."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pyro
from torch import Tensor, nn

from pvi.engine.local import request
from pvi.errors import ModelError
from pvi.models.bnn.likelihoods import Gaussian, Likelihood
from pvi.models.bnn.network import Network
from pvi.models.bnn.priors import FanIn, as_prior
from pvi.models.bnn.selection import Weight, select

COPIES = "copies"


class BayesianModule(nn.Module):
    """A module whose weights are random, as a Pyro program of $x$ and $y$: see `bayesianize`.

    Attributes:
        module: the user's, which stays as it is.
        prior, likelihood: what the model is made of.
        sites: names of the random tensors.
        plate: the name of the plate of the data.
        copies: how many independent networks there are.
    """

    def __init__(
        self,
        module: nn.Module,
        prior: Any,
        where: Any,
        likelihood: Likelihood,
        plate: str,
        copies: int,
    ):
        super().__init__()
        _check_norms(module)
        self.module, self.prior, self.likelihood = module, as_prior(prior), likelihood
        self.plate, self.copies = plate, copies
        self._weights = select(module, where)
        self._network = Network(module, self._weights, copies)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def weights(self) -> dict[str, Weight]:
        """The random tensors by the name of their site."""
        return dict(self._weights)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are no latents: those of the module that were not selected."""
        random = {id(p) for n, p in self.module.named_parameters() if n in self._weights}
        for name, parameter in super().named_parameters(*args, **kwargs):
            if id(parameter) not in random:
                yield name, parameter

    def forward(self, x: Tensor | tuple[Tensor, ...], y: Tensor | None = None) -> Tensor:
        """Sample weights and, for each datum, the function f and the target y.

        Args:
            x: inputs of the module, a tensor `(N, ...)` or a tuple of such; with copies
                `(N, copies, ...)`.
            y: targets `(N)` or `(N, targets)`, with copies `(N, copies)` or `(N, copies, targets)`;
                `None` to draw them.

        Returns:
            The site y.
        """
        inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
        self._check(inputs)
        self._register()
        copies = self._copies_plate()
        with copies:
            values = {n: pyro.sample(n, self.prior(weight)) for n, weight in self._weights.items()}
        f = self._function(inputs, values)
        with copies:
            latents = self.likelihood.latents(f)
        rows = pyro.plate(self.plate, len(inputs[0]), dim=-2 if self.copies > 1 else -1)
        with rows, copies:
            f = pyro.deterministic("f", f, event_dim=1)
            return pyro.sample("y", self.likelihood(f, **latents), obs=y)

    def _register(self) -> None:
        """Tell Pyro of the parameters that are no latents."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            with warnings.catch_warnings():  # of Pyro's, on parameters that are frozen on purpose
                warnings.filterwarnings("ignore", ".*requires_grad=False")
                pyro.module(type(self).__name__.lower(), self)

    def _function(self, inputs: tuple[Tensor, ...], values: dict[str, Tensor]) -> Tensor:
        asked = request(self.sites)
        if asked.kind is not None:
            asked.how |= self._network.how(asked.kind, inputs)
        f = self._network(inputs, values, asked.normals, asked.how)
        if self._network.looped:
            asked.notes.append(f"network run draw by draw: {self._network.looped}")
        return f

    def _copies_plate(self) -> Any:
        return pyro.plate(COPIES, self.copies, dim=-1) if self.copies > 1 else nullcontext()

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        for x in inputs:
            if self.copies > 1 and (x.dim() < 2 or x.shape[1] != self.copies):
                raise ModelError(
                    f"with copies={self.copies} x must have shape (N, {self.copies}, ...), one "
                    f"column for each network, but has {tuple(x.shape)}"
                )


def bayesianize(
    module: nn.Module,
    *,
    prior: Any = None,
    where: Any = None,
    likelihood: Likelihood | None = None,
    plate: str = "data",
    copies: int = 1,
) -> BayesianModule:
    """A Pyro model $w \\sim p(w)$, $y_i \\sim p(y \\mid f(x_i; w))$ from any module $f$.

    Each selected parameter tensor is one latent site of the same name, tied ones are one. The
    module is run on draws of them and stays as it is: its own parameters and buffers, modes and
    hooks. What is not selected is learned with the guide as a point, or fixed where it needs no
    gradient. Batch norms use their running statistics, for those of a batch would couple its rows.

    Args:
        module: from x `(N, ...)` to `(N, outputs)` or `(N)`.
        prior: of the weights: one of this package, `FanIn()` by default, a Pyro distribution of
            single numbers, or what `fit.posterior.as_prior()` gives.
        where: which parameters are random: `None` for all, a pattern of names ("head.*"), a type of
            submodules or a tuple of them, or a function of (name, submodule, parameter) such as
            `weights` and `last_layer(module)`.
        likelihood: of the targets; `Gaussian()` with a latent noise by default.
        plate: the name of the plate of the data.
        copies: so many independent networks in the plate "copies", each with weights, data and
            targets of its own: x is `(N, copies, ...)`, y `(N, copies)`.

    Returns:
        The model, a Pyro program of `(x, y=None)` for `pvi.fit` or anything that takes programs.

    Raises:
        ModelError: `where` selects nothing, or the module normalises by the batch alone.

    >>> import pvi, torch
    >>> x = torch.linspace(-1.0, 1.0, 20).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    >>> model = bayesianize(net, likelihood=Gaussian(0.1))
    >>> model.sites
    ('0.weight', '0.bias', '2.weight', '2.bias')
    >>> fit = pvi.fit(pvi.local_reparam(model), data=(x, x[:, 0] ** 2), steps=50, seed=0)
    >>> tuple(fit.posterior.predict(x, num_draws=10)["y"].shape)
    (10, 20)
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(copies, int) or copies < 1:
        raise ModelError(f"copies must be a whole number >= 1, got {copies!r}")
    likelihood = Gaussian() if likelihood is None else likelihood
    if not isinstance(likelihood, Likelihood):
        raise ModelError(f"likelihood must be one of pvi.models.bnn, got {likelihood!r}")
    prior = FanIn() if prior is None else prior
    return BayesianModule(module, prior, where, likelihood, plate, copies)


def _check_norms(module: nn.Module) -> None:
    """Refuse norms that know no other statistics than those of a batch."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and not part.track_running_stats:
            raise ModelError(
                f"submodule '{name}' normalises by the statistics of the batch, so the function of "
                "a datum depends on the other rows. Use LayerNorm or GroupNorm, or keep running "
                "statistics."
            )
