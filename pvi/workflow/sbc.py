"""`pvi.sbc`: do fits of simulated data recover what the data were simulated from?"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from pvi.engine.data import as_data
from pvi.engine.numbers import check_seed, whole_number
from pvi.engine.traces import Program
from pvi.errors import DataError, FitError, GuideError, ModelError, PviError
from pvi.fit.entry import fit
from pvi.posterior import Posterior
from pvi.progress import progress as progress_bar
from pvi.workflow.calibration import SBC
from pvi.workflow.simulation import LOG_JOINT, Drawn, Quantity, Record, Task, check_fixed
from pvi.workflow.stored import Folder, saved_seed
from pvi.workflow.workers import records, start_method

NO_JOINT = (
    "log_joint is left out: with reparam= fits have other coordinates (or a site has its name)"
)
TRIES = 5  # simulations of which one must succeed
OURS = ("model", "guide", "data", "args", "kwargs", "seed", "progress", "checkpoint", "every")


def sbc(
    model: Program,
    guide: Any = None,
    data: Any = (),
    *,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    simulator: Program | None = None,
    num_simulations: int = 200,
    num_draws: int = 999,
    correct: str | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    sites: Sequence[str] | None = None,
    num_workers: int = 1,
    path: Any = None,
    seed: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> SBC:
    r"""Simulation-based calibration: fit data sets of known truth, and rank the truths.

    .. math::
        \theta_i \sim p(\theta), \quad y_i \sim p(y \mid \theta_i), \quad
        \theta_{i1}, \dots, \theta_{iS} \sim q_i(\theta) \approx p(\theta \mid y_i), \quad
        r_i = \#\{s : \theta_{is} < \theta_i\}

    If every :math:`q_i` is the posterior, the ranks are uniform on 0, ..., S, for each number of
    each site and for every test quantity of latents and data. The log joint density is always
    one, as ranks of latents alone can't see data that are ignored. The result has p-values, the
    shapes of departures, expected coverage, and pictures; `print` it.

    Args:
        model: an ordinary Pyro program with proper priors; its observations are simulated.
        guide: as in `pvi.fit` (`None`, a class of `pvi.guides`, a guide that is copied for each
            fit, a Pyro program), or a function without arguments that makes one. Or a trained `Fit`
            or `Posterior` whose guide reads its latents off the data: it is reused, without fits.
        data, args, kwargs: as in `pvi.fit`; by default those of a trained fit. Covariates stay as
            they are; observations give shapes and masks only, their values are replaced.
        simulator: another program with the same sites that data are drawn from, to study a fitted
            model that is wrong.
        num_simulations: data sets N.
        num_draws: draws S of each fit.
        correct: "psis" ranks with Pareto-smoothed importance weights.
        quantities: name -> function of (latents, data), dicts by name of one draw of all sites and
            of the arguments and observations, that returns one number.
        sites: names of the sites to rank; by default all, deterministic ones too.
        num_workers: processes that simulate, each with one thread. Every simulation has a seed of
            its own, so their number changes nothing beyond rounding.
        path: a folder that each finished simulation is written to; a second call with the same
            arguments goes on from there, also to more simulations.
        seed: makes the result repeatable and leaves the caller's random state alone.
        progress: a progress bar; by default on terminals, from the second second.
        options: of `pvi.fit`.

    Returns:
        An `SBC`. Simulations that fail are in its `failures`; interrupting (Ctrl-C) returns what
        has ended.

    Raises:
        ModelError: the model has parameters of its own, no observed site, or reads the
            observations elsewhere too, so that it can't be simulated.
        GuideError: a `Fit` whose guide does not read the data.
        ObjectiveError: `pyro.factor` or `obs_mask`, from which no data can be drawn.
        FitError: an option that `pvi.fit` does not have, or the first simulations all fail.
        CheckpointError: `path` is of another model or other settings.

    Reference:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian Inference
        Algorithms with Simulation-Based Calibration; Yao et al. (2018), Yes, but Did It Work?;
        Säilynoja, Bürkner, Vehtari (2022) for the test; Modrák et al. (2023), Simulation-Based
        Calibration Checking for Bayesian Computation: The Choice of Test Quantities.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.), obs=y)
        >>> def posterior(y):
        ...     pyro.sample("mu", dist.Normal(y.sum() / 4, 0.5))
        >>> y = torch.zeros(3)
        >>> exact = Posterior(model, posterior, y)  # or a Fit with an amortised guide
        >>> found = sbc(model, exact, y, num_simulations=50, num_draws=99, seed=1)
        >>> found.ranks["mu"].shape, found.calibrated
        ((50,), True)
    """
    num_simulations = whole_number("num_simulations", num_simulations)
    num_workers = whole_number("num_workers", num_workers)
    _check_options(options, correct)
    task = _task(model, guide, data, args, kwargs, simulator, options)
    task.num_draws, task.correct = whole_number("num_draws", num_draws), correct
    task.quantities, task.sites = dict(quantities or {}), None if sites is None else tuple(sites)
    task.seed = _seed(seed, path)
    task.log_joint = options.get("reparam") is None
    drawn = _look(task)
    folder = None if path is None else Folder(path, _settings(task, drawn))
    known = {} if folder is None else folder.records()
    found = {number: record for number, record in known.items() if number < num_simulations}
    notes = [] if task.log_joint else [NO_JOINT]
    todo = [number for number in range(num_simulations) if number not in found]
    method, payload, note = start_method(task, min(num_workers, len(todo)))
    notes += filter(None, [note])
    try:
        with closing(records(task, todo, num_workers, method, payload)) as made:
            for record in _shown(made, len(todo), progress):
                found[record.number] = record
                if folder is not None:
                    folder.save(record)
                _give_up(found)
    except KeyboardInterrupt:
        if all(record.error for record in found.values()):
            raise
        notes.append(f"interrupted after {len(found)} of {num_simulations} simulations")
    if all(record.error for record in found.values()):
        raise FitError(f"every simulation failed; the first: {found[min(found)].error}")
    return _result([found[number] for number in sorted(found)], task, drawn, notes)


def _shown(made: Iterable[Record], total: int, progress: bool | None) -> Iterable[Record]:
    return made if progress is False else progress_bar(made, "simulate", total)


def _task(
    model: Program,
    guide: Any,
    data: Any,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    simulator: Program | None,
    options: dict[str, Any],
) -> Task:
    """What is to be fitted to what."""
    posterior = guide if isinstance(guide, Posterior) else getattr(guide, "posterior", None)
    if not isinstance(posterior, Posterior):
        posterior = None
    if not callable(model):
        raise ModelError(f"model must be a Pyro program, got {type(model).__name__}")
    if posterior is None and not (guide is None or callable(guide)):
        raise GuideError(
            "guide must be a function that makes one, a Pyro program, a class of pvi.guides, a Fit "
            f"or a Posterior, got {type(guide).__name__}"
        )
    if posterior is not None and posterior.model is not model:
        raise ModelError(
            "the fit is of another model than model=: pass fit.model, and as simulator= the "
            "program that data are to be drawn from"
        )
    if posterior is not None and options:
        raise FitError(f"a trained guide is not fitted again: leave out {', '.join(options)}")
    given = not (isinstance(data, tuple) and not data) or args or kwargs
    rows = as_data(data, args, kwargs, model) if given or posterior is None else posterior.data
    rows = rows.kept()
    if posterior is None:
        for program in dict.fromkeys((model, simulator or model)):
            check_fixed(program, *rows.whole())
    return Task(model, simulator or model, guide, posterior, rows, options)


def _check_options(options: Mapping[str, Any], correct: Any) -> None:
    known = [n for n in inspect.signature(fit).parameters if n not in OURS]
    for name in options:
        if name not in known:
            raise FitError(f"neither pvi.sbc nor pvi.fit has an argument '{name}' for sbc to pass")
    if correct not in (None, "psis"):
        raise FitError(f"correct must be None or 'psis', got {correct!r}")


def _seed(seed: int | None, path: Any) -> int:
    """The seed given, that of an earlier call, or a new one."""
    given = check_seed(seed)
    if given is None and path is not None:
        given = saved_seed(path)
    return int(torch.randint(2**31, ())) if given is None else given


def _first(task: Task) -> Drawn:
    """A data set: one prior draw may be beyond what the model computes, not `TRIES` of them."""
    for number in range(TRIES - 1):
        try:
            return task.draw(number)
        except PviError:
            raise
        except Exception:
            continue
    return task.draw(TRIES - 1)


def _look(task: Task) -> Drawn:
    """A first data set, to find mistakes before any fit.

    Raises:
        PviError: what is wrong with the model, the guide or the options.
    """
    drawn = _first(task)
    task.log_joint &= LOG_JOINT not in drawn.truth
    names = [*drawn.truth]
    if not drawn.observed:
        raise ModelError(
            "the model has no observed site, so there is nothing to fit. Give data with the "
            "outcomes: their values do not matter, only their shapes."
        )
    if unknown := [n for n in task.sites or () if n not in names]:
        raise DataError(f"sites: there is no site '{unknown[0]}'; there are {names}")
    for name, quantity in task.quantities.items():
        if name in names or name == LOG_JOINT or not callable(quantity):
            raise DataError(
                f"quantities['{name}'] must be a function under a name that no site has "
                f"({', '.join([*names, LOG_JOINT])} are taken)"
            )
    if task.log_joint:
        task.density(drawn)
    if task.posterior is not None:
        _check_amortized(task, drawn)
    return drawn


def _check_amortized(task: Task, drawn: Drawn) -> None:
    """Whether a trained guide gives other draws for other data."""
    both = [task.posterior_of(one, 0)[0] for one in (drawn, task.draw(TRIES))]
    one, other = (posterior.draws(2, seed=0).values for posterior in both)
    if all(torch.equal(one[name], other[name]) for name in one):
        raise GuideError(
            "the guide of this fit gives the same draws whatever the data, so it can't be reused "
            "on simulated ones. Take one that reads its latents off the data (pvi.guides."
            "Amortized), or pass the guide itself in place of the fit, to fit it to each data set."
        )


def _settings(task: Task, drawn: Drawn) -> dict[str, Any]:
    """What makes these simulations these, as plain data."""
    guide = task.guide if task.posterior is None else task.posterior.guide
    return {
        "seed": task.seed,
        "num_draws": task.num_draws,
        "correct": task.correct,
        "quantities": list(task.quantities),
        "sites": None if task.sites is None else list(task.sites),
        "guide": _name(guide),
        "options": {name: _name(value) for name, value in sorted(task.options.items())},
        "data": {k: list(x) for k, x in task.data.fingerprint().items()},
        "truth": {n: float(x.double().abs().sum()) for n, x in drawn.truth.items()},
        "log density": task.density(drawn),
    }


def _name(value: Any) -> str:
    """A program or an option in words that are the same in another process."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _give_up(found: Mapping[int, Record]) -> None:
    errors = [record.error for record in found.values()]
    if len(errors) >= TRIES and all(errors):
        raise FitError(f"the first {len(errors)} simulations failed: {errors[0]}")


def _result(ended: list[Record], task: Task, drawn: Drawn, notes: list[str]) -> SBC:
    good = [record for record in ended if not record.error]
    names = list(good[0].values["pit"])
    stacked = {
        key: {n: np.stack([record.values[key][n] for record in good]) for n in names}
        for key in ("pit", "truth", "mean", "sd")
    }
    return SBC(
        numbers=np.array([record.number for record in good]),
        pit=stacked["pit"],
        truths=stacked["truth"],
        means=stacked["mean"],
        sds=stacked["sd"],
        num_draws=task.num_draws,
        dims={name: drawn.dims.get(name, ()) for name in names},
        khat=np.array([record.khat for record in good]),
        failures={record.number: record.error for record in ended if record.error},
        unconverged={record.number: record.reason for record in good if record.reason},
        notes=tuple(notes),
        seed=task.seed,
    )
