"""Draws, predictions and log weights of a fitted guide."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor

from pvi.engine.checks import check, check_values
from pvi.engine.data import Data, as_data
from pvi.engine.failures import explained
from pvi.engine.numbers import check_seed
from pvi.engine.params import Params, check_trained
from pvi.engine.plan import make_plan
from pvi.engine.reparam import dependent_sites
from pvi.engine.traces import Program, is_certain, preserved_on_error, preserved_rng
from pvi.errors import GuideError, ObjectiveError
from pvi.guides import Guide
from pvi.guides.guide import as_guide
from pvi.posterior.draws import Draws, Runner, stack_draws
from pvi.posterior.draws import stack as stacked
from pvi.posterior.local import with_rows
from pvi.posterior.partial import caveat, row_sites, without_rows
from pvi.posterior.predictive import check_plates, new_arguments
from pvi.posterior.resample import check_correct, choose, chosen_runs, seeded


class Posterior:
    """The posterior that a guide stands for, given a model and its data.

    Works for every guide that plain Pyro has trained: `Posterior(model, guide, data)` takes a copy
    of the parameters in Pyro's global store; `from_svi(svi, data)` the same from an `SVI` object.

    Args:
        model, guide: the Pyro programs.
        data: the model's arguments, as in `pvi.fit`; `args` and `kwargs` those that are not rows.

    Raises:
        DataError, ModelError, GuideError: model and guide do not fit together or the data.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Any = (),
        *,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        params: Params | None = None,
        device: Any = None,
        checked: bool = False,
        caveats: tuple[str, ...] = (),
    ):
        guide = as_guide(guide, model)
        self.model, self.guide = model, guide
        self.data = data if isinstance(data, Data) else as_data(data, args, kwargs, model)
        self._device = device
        self._caveats = caveats
        self._params = params or Params(
            model, guide, state=dict(pyro.get_param_store().get_state())
        )
        if not checked:
            check_values(self.data.named())
            known = self._params.names()
            with self._params.scope(), self._params.evaluation():
                check(model, guide, *self.data.probe(), self.data.named())
            check_trained(
                self._params.names() - known,
                "Train the guide first; after pvi.fit use fit.posterior, or "
                "fit.posterior.on(data) for other data.",
            )
        if params is None:
            self._params.freeze()
        self._runner: Runner | None = None

    def sample(
        self, num_draws: int = 1000, *, seed: int | None = None, correct: str | None = None
    ) -> dict[str, Tensor]:
        """Draws of every latent and deterministic site, `(num_draws, *site shape)`.

        Where the data are too large for memory, of the sites that belong to no single row.

        Args:
            correct: as in `to_arviz`.
        """
        check_correct(correct)
        with ExitStack() as stack:
            chosen = None
            if correct:
                seed = stack.enter_context(seeded(seed))
                chosen = choose(self, num_draws, seed)[1]
            runner = stack.enter_context(self.drawing(seed))
            runs = chosen_runs(runner, num_draws, chosen)
            draws = stacked(
                [{name: x[keep] for name, x in run.sample().items()} for run, keep in runs]
            )
            if self.data.fits:
                return draws
            return without_rows(draws, row_sites(self.model, self.guide, self.data))

    def draws(self, num_draws: int = 1000, *, seed: int | None = None) -> Draws:
        """Draws of the latent sites with their log p(x, z) and log q(z), nats."""
        self.data.whole()
        with self.drawing(seed) as runner:
            return stack_draws([run.draws() for run in runner.runs(num_draws)])

    def log_weights(self, num_draws: int = 1000, *, seed: int | None = None) -> Tensor:
        """Log ratios $\\log p(x, z_s) - \\log q(z_s)$ of fresh draws, `(num_draws,)`, nats.

        Raises:
            ObjectiveError: they mean nothing here (a point estimate, subsampled plates).
        """
        self.check_weights()
        draws = self.draws(num_draws, seed=seed)
        return draws.log_p - draws.log_q

    def check_weights(self) -> None:
        """Raise `ObjectiveError` if the log weights mean nothing here."""
        if caveats := self.caveats():
            raise ObjectiveError(f"log weights are not available: {'; '.join(caveats)}")

    def log_likelihood(
        self, num_draws: int = 1000, *, seed: int | None = None
    ) -> dict[str, Tensor]:
        """Log density of every observation at each draw, `(num_draws, *batch)`, nats, unscaled."""
        self.data.whole()
        with self.drawing(seed) as runner:
            return stacked([run.log_likelihood() for run in runner.runs(num_draws)])

    def predict(
        self,
        *new_data: Any,
        num_draws: int = 1000,
        seed: int | None = None,
        infer_local: int | None = None,
        **new_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws of the observed sites (and deterministic ones) from the posterior predictive.

        Without arguments for the training data; with arguments for new data, which may have another
        number of rows. Arguments that hold the outcome may be left out. Latents outside the data's
        plate keep their posterior; those inside belong to the rows, in order, unless the guide
        reads them off the new data.

        Args:
            infer_local: steps to learn the latents of new rows from their observations, for guides
                of `pvi.guides` that own a row of parameters for each row.

        Returns:
            `(num_draws, *site shape)` for each site.

        Raises:
            GuideError: a latent belongs to the rows of the training data and can't be extrapolated.
        """
        args, kwargs, named = new_arguments(self.model, self.data, new_data, new_kwargs)
        with ExitStack() as stack:
            roles = {"model": self.model, "guide": self.guide}
            stack.enter_context(explained(roles, lambda: named))
            runner = stack.enter_context(self.drawing(seed))
            names = [*runner.observed, *runner.deterministic]
            if new_data or new_kwargs:
                guide, plan = self.guide, runner.plan
                if infer_local is None:
                    check_plates(self.model, guide, args, kwargs, named)
                else:
                    guide, params = self._with_rows(args, kwargs, infer_local)
                    stack.enter_context(params.scope())
                rows = self.data.size if self.data.fits else self.data.shown
                runner = Runner(self.model, guide, args, kwargs, plan, runner, rows)
            return stacked([run.predictive(names) for run in runner.runs(num_draws)])

    def on_new(self, new_data: Any, runner: Runner) -> tuple[Runner, dict[str, Any]]:
        """How to draw for new data, and they by name. Call it inside `drawing`."""
        by_name = new_data if isinstance(new_data, Mapping) else {}
        places = () if by_name else new_data if isinstance(new_data, tuple) else (new_data,)
        args, kwargs, named = new_arguments(self.model, self.data, places, by_name)
        check_plates(self.model, self.guide, args, kwargs, named)
        new = Runner(self.model, self.guide, args, kwargs, runner.plan, runner, self.data.size)
        return new, {name: value for name, value in named.items() if value is not None}

    def _with_rows(self, args: tuple, kwargs: Mapping, steps: int) -> tuple[Guide, Params]:
        return with_rows(self.model, self.guide, self.data, args, kwargs, steps)

    def caveats(self) -> list[str]:
        """Why the log weights of this posterior would be meaningless; empty if they are sound."""
        sites, points = self.runner.sites, self.runner.plan.points
        reasons = [*self._caveats, *([] if self.data.fits else [caveat(self.data)])]
        if not any(site.p is not None and site.q is not None for site in sites):
            reasons.append("the model has no latent site")
        for site in sites:
            if site.q is None:
                continue
            if site.p is not None and site.name in points:
                reasons.append(f"the guide is a point (Delta) at site '{site.name}'")
            if is_certain(site.q.fn):
                reasons.append(f"the guide has one value at discrete site '{site.name}'")
            if isinstance(site.q.scale, Tensor) or site.q.scale != 1.0:
                reasons.append(
                    f"the guide scales site '{site.name}' (poutine.scale), so log p - log q is no "
                    "weight: diagnose the programs without the scale"
                )
        effects = [*self.runner.guide_trace.effects, *self.runner.model_trace.effects]
        reasons += [
            f"pvi.kl '{message['name']}' integrates a latent that has no draws"
            for message in effects
            if message["kind"] == "kl"
        ]
        return reasons + [
            f"site '{site.name}' is in a subsampled plate"
            for site in sites
            if site.subsample_scale != 1.0
        ]

    @property
    def params(self) -> Params:
        """The parameters of model and guide, with the values of this posterior in their scope."""
        return self._params

    @property
    def reservations(self) -> tuple[str, ...]:
        """The caveats that came with the fit, such as KL weights other than 1."""
        return self._caveats

    def dependent_latents(self) -> list[str]:
        """Latents whose location or scale depends on another: see `reparam=` of `pvi.fit`."""
        with self.drawing(None):
            return list(dependent_sites(self.model, *self.data.probe()))

    def on(
        self,
        data: Any,
        *,
        args: tuple | None = None,
        kwargs: Mapping[str, Any] | None = None,
        infer_local: int | None = None,
    ) -> "Posterior":
        """The same programs and parameters on other data, such as held-out rows of a VAE.

        Args:
            data: as in `pvi.fit`.
            args, kwargs: as in `pvi.fit`; by default those of these data.
            infer_local: as in `predict`.
        """
        args = self.data.args if args is None else args
        kwargs = self.data.kwargs if kwargs is None else kwargs
        guide, params, new = self.guide, self._params, as_data(data, args, kwargs, self.model)
        if infer_local is not None:
            with self.drawing(None):
                guide, params = self._with_rows(*new.whole(), infer_local)
        return Posterior(
            self.model, guide, new, params=params, device=self._device, caveats=self._caveats
        )

    def to_datatree(self, num_draws: int = 1000, **options: Any) -> Any:
        """The posterior as an `xarray.DataTree`; options as in `to_arviz`."""
        from pvi.posterior.arviz import to_datatree

        return to_datatree(self, num_draws, **options)

    def to_arviz(self, num_draws: int = 1000, **options: Any) -> Any:
        """The posterior in arviz's form: `InferenceData` for arviz 0.x, `DataTree` for 1.x.

        Groups posterior, posterior_predictive, log_likelihood, log_prior, observed_data,
        constant_data and sample_stats: log_p, log_q and, where they mean something, `log_weight`
        (normalised PSIS log weights) with the attribute `khat`. Dims are named after plates, then
        by `dims` or by `infer={"event_dims": [...]}` of the site. "/" in names becomes "_".

        Args:
            coords: dict from dimension to labels.
            dims: dict from site to the names of its event dimensions.
            index_origin: first number of dimensions without labels.
            predictive, log_likelihood, log_prior: leave these groups out with `False` (they can be
                large).
            prior: draw the groups prior and prior_predictive as well.
            predictions: new data, as a tuple or a dict of arguments, for the groups predictions and
                predictions_constant_data; as in `predict`.
            pred_coords, pred_dims: labels of the new rows, and names, by default as above.
            correct: "psis" resamples 10 num_draws draws by their PSIS weights, systematically, so
                that they follow the posterior where the guide alone does not quite.
            path: a netCDF file (.nc) to which the draws are written piece by piece, in bounded
                memory; the result reads from it what is used.
            seed: makes the draws repeatable.

        Raises:
            DataError: names or labels that do not fit the sites.
            ObjectiveError, GuideError: `correct` where there are no weights, or khat is too high.
        """
        from pvi.posterior.arviz import to_arviz

        return to_arviz(self, num_draws, **options)

    def as_prior(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Marginal mean and sd of every site of real numbers: the prior of what comes next.

        `prior=` of `pvi.models.bnn.bayesianize` takes it (variational continual learning, Nguyen
        et al. 2018). Correlations are left behind.

        Raises:
            GuideError: the guide has them in closed form at no site.
        """
        with self.drawing(None):
            found = self.guide.moments() if isinstance(self.guide, Guide) else {}
        if not found:
            raise GuideError(
                f"{type(self.guide).__name__} has no marginal means and sds in closed form. Fit "
                "pvi.guides.MeanField, LowRank or FullRank to carry on from"
            )
        return {n: (m.detach().clone(), s.detach().clone()) for n, (m, s) in found.items()}

    @property
    def runner(self) -> Runner:
        """How to draw: made at first use by looking at both programs."""
        with self.drawing(None) as runner:
            return runner

    @contextmanager
    def drawing(self, seed: int | None) -> Iterator[Runner]:
        """Inside: our own parameters, no gradients, modules in evaluation mode, our own seed."""
        seed = check_seed(seed)
        with ExitStack() as stack:
            stack.enter_context(self._params.scope())
            stack.enter_context(self._params.evaluation())
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.device(self._device) if self._device else nullcontext())
            if self._runner is None:
                args, kwargs = self.data.whole() if self.data.fits else self.data.probe()
                plan = make_plan(self.model, self.guide, args, kwargs, "joint", average=False)
                self._runner = Runner(self.model, self.guide, args, kwargs, plan)
            stack.enter_context(preserved_on_error() if seed is None else preserved_rng())
            if seed is not None:
                torch.manual_seed(seed)
            yield self._runner


def from_svi(
    svi: Any, data: Any = (), *, args: tuple = (), kwargs: Mapping[str, Any] | None = None
) -> Posterior:
    """The posterior of a trained `pyro.infer.SVI` object.

    Args:
        svi: an `SVI` after its last step; its parameters are copied, so it may train on.
        data, args, kwargs: the arguments that its steps were given.
    """
    return Posterior(svi.model, svi.guide, data, args=args, kwargs=kwargs)
