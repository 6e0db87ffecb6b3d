"""Escalation: Pyro's NUTS, warm-started by a guide, where the guide is not good enough."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pvi.engine.numbers import whole_number
from pvi.engine.traces import preserved_rng
from pvi.errors import DataError, ModelError
from pvi.posterior import Posterior
from pvi.posterior.arviz import load
from pvi.progress import progress
from pvi.workflow.against import Against, against

SHRINK = 1e-6  # of a variance, so that nearly singular covariances have a root


@dataclass(frozen=True)
class Chains:
    """What NUTS has drawn.

    Attributes:
        draws: Latent and deterministic sites, `(chains, draws, *site shape)`.
        diverging: `(chains, draws)`, whether a trajectory diverged.
        gradients: Gradients of the log density, with those of the warm-up.
        against: The posterior that they started from, compared with them.
    """

    draws: dict[str, Tensor]
    diverging: Tensor
    gradients: int
    against: Against
    posterior: Posterior

    def to_arviz(self) -> Any:
        """Groups posterior and sample_stats, in the form of the installed arviz."""
        import xarray

        from pvi.posterior.arviz import dataset

        joined = [
            dataset(self.posterior, {n: v[c] for n, v in self.draws.items()})
            for c in range(len(self.diverging))
        ]
        posterior = xarray.concat(joined, "chain").assign_coords(chain=range(len(joined)))
        posterior.attrs["inference_library"] = "pyro"
        stats = xarray.Dataset(
            {"diverging": (("chain", "draw"), self.diverging.numpy())},
            {"chain": posterior.chain, "draw": posterior.draw},
        )
        tree = xarray.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})
        arviz = load()
        old = arviz.__version__.startswith("0.")
        return arviz.InferenceData.from_datatree(tree) if old else tree

    def __str__(self) -> str:
        chains, draws = self.diverging.shape
        bad = int(self.diverging.sum())
        lines = [f"NUTS: {chains} chains of {draws:,} draws, {self.gradients:,} gradients"]
        if bad:
            lines.append(
                f"{bad:,} draws diverged: the chains miss a part of the posterior; try "
                "reparam='noncentered' in the fit, or a larger target_accept_prob"
            )
        return "\n".join([*lines, "the guide beside them:", str(self.against)])


def nuts(
    target: Any,
    num_samples: int = 1000,
    *,
    warmup: int = 300,
    num_chains: int = 4,
    target_accept_prob: float = 0.8,
    seed: int = 0,
) -> Chains:
    r"""Run Pyro's NUTS on the model of a fit, from draws of the guide and in its coordinates.

    .. math:: u = m + L \epsilon, \qquad U(\epsilon) = -\log p(x, z(u)) - \log |dz/du|

    with mean m and covariance :math:`L L^\top` of the guide in unconstrained space, so that a guide
    near the posterior leaves little to adapt; a diagonal mass matrix is adapted on top. The chains
    start at draws of the guide, one after another in this process.

    Args:
        target: A `Posterior`, or anything with a `.posterior` (a `Fit`).
        num_samples: Draws of each chain.
        warmup: Draws of each chain before them, which are thrown away.
        num_chains: Chains.
        target_accept_prob: Of the step size; larger is slower and diverges less.
        seed: Of everything.

    Returns:
        The chains, for arviz by `to_arviz()`, and the guide beside them; `print` it.

    Raises:
        ModelError: A discrete latent that is drawn (and not enumerated), a subsampled plate,
            `pvi.kl`.
        DataError: The data don't fit in memory; numbers that are not whole.

    Reference:
        Hoffman, Gelman (2014), The No-U-Turn Sampler, JMLR 15; Hoffman et al. (2019), NeuTra-lizing
        Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport.
    """
    posterior = getattr(target, "posterior", target)
    counts = {"num_samples": num_samples, "warmup": warmup, "num_chains": num_chains}
    for name, count in counts.items():
        whole_number(name, count, error=DataError)
    _check(posterior)
    args, kwargs = posterior.data.whole()
    with posterior.drawing(seed) as runner, preserved_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        space = Space(posterior, args, kwargs, seed)
        bar = iter(progress(range(num_chains * (warmup + num_samples)), "nuts"))
        chains, diverging = [], torch.zeros(num_chains, num_samples, dtype=torch.bool)
        with pyro.validation_enabled(False):
            for chain in range(num_chains):
                kernel = NUTS(potential_fn=space, target_accept_prob=target_accept_prob)
                mcmc = MCMC(
                    kernel,
                    num_samples=num_samples,
                    warmup_steps=warmup,
                    initial_params={"e": space.starts[chain]},
                    hook_fn=lambda *_: next(bar, None),
                    disable_progbar=True,
                )
                mcmc.run()
                chains.append(mcmc.get_samples()["e"])
                diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
        list(bar)
        values = space.sites(torch.cat(chains))
        values |= _deterministic(posterior, runner, args, kwargs, values)
    draws = {n: v.reshape(num_chains, num_samples, *v.shape[1:]).cpu() for n, v in values.items()}
    compared = against(posterior, draws, seed=seed)
    return Chains(draws, diverging, space.gradients, compared, posterior)


class Space:
    """The potential energy of a model in the coordinates of a guide.

    Args:
        posterior: the guide, with its parameters in scope.
        args, kwargs: the model's.
        seed: of the guide's draws.
    """

    def __init__(self, posterior: Posterior, args: tuple, kwargs: Mapping, seed: int):
        found = initialize_model(posterior.model, args, dict(kwargs))
        first, self._potential, self._transforms, _ = found
        self._shapes = {name: value.shape for name, value in first.items()}
        self.gradients = 0
        size = sum(shape.numel() for shape in self._shapes.values())
        values = posterior.sample(max(1000, 20 * size), seed=seed)
        parts = [self._transforms[n](values[n]).reshape(len(values[n]), -1) for n in self._shapes]
        u = torch.cat(parts, 1).detach()
        u = u[u.isfinite().all(1)]
        cov = torch.atleast_2d(u.double().T.cov())
        var = cov.diagonal()
        cov = cov + torch.diag(torch.where(var > 0.0, SHRINK * var, 1.0))  # a point has no spread
        self._mean = u.mean(0)
        self._root = torch.linalg.cholesky(cov).to(u)
        centred = (u - self._mean)[torch.randperm(len(u))]
        self.starts = torch.linalg.solve_triangular(self._root, centred.T, upper=False).T

    def _split(self, e: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Unconstrained values of each site at points `(*outer, size)`."""
        u = self._mean + e @ self._root.T
        sizes = [shape.numel() for shape in self._shapes.values()]
        for (name, shape), part in zip(self._shapes.items(), u.split(sizes, -1), strict=True):
            yield name, part.reshape((*e.shape[:-1], *shape))

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Energy at `{"e": (size,)}`, nats."""
        self.gradients += 1
        return self._potential(dict(self._split(params["e"])))

    def sites(self, e: Tensor) -> dict[str, Tensor]:
        """Values of the sites at points `(S, size)`."""
        return {name: self._transforms[name].inv(u).detach() for name, u in self._split(e)}


def _check(posterior: Posterior) -> None:
    """Refuse models whose density NUTS can't follow."""
    runner = posterior.runner
    if not posterior.data.fits:
        raise DataError("nuts needs all data in memory at every step")
    summed = runner.plan.enumeration.summed
    for site in runner.sites:
        if site.subsample_scale != 1.0:
            raise ModelError(
                f"site '{site.name}' is in a subsampled plate, so the density is an estimate; NUTS "
                "needs all the data: run the model without subsample_size"
            )
        discrete = site.p is not None and site.p.fn.support.is_discrete
        if not site.observed and discrete and site.name not in summed:
            raise ModelError(
                f"latent '{site.name}' is discrete, and NUTS needs gradients: sum it out with "
                'infer={"enumerate": "parallel"} in the model'
            )
    effects = [*runner.guide_trace.effects, *runner.model_trace.effects]
    if any(message["kind"] == "kl" for message in effects):
        raise ModelError("pvi.kl integrates a latent that has no density to follow")


def _deterministic(
    posterior: Posterior, runner: Any, args: tuple, kwargs: Mapping, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Draws of the `pyro.deterministic` sites."""
    if not runner.deterministic:
        return {}
    parallel = runner.plan.vectorized and not runner.plan.mapped
    predict = Predictive(
        posterior.model, values, return_sites=runner.deterministic, parallel=parallel
    )
    with torch.no_grad():
        found = predict(*args, **kwargs)
    return {n: v.reshape(len(v), *runner.nodes[n]["value"].shape) for n, v in found.items()}
