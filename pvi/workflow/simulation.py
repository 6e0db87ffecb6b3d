"""One simulation of a calibration: draw latents and data, fit, and see where the latents fall."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pvi.engine.data import Data
from pvi.engine.params import Params
from pvi.engine.plan import Plan, make_plan
from pvi.engine.simulate import replayed, simulate
from pvi.engine.traces import (
    Program,
    conditioned,
    deterministic_nodes,
    hidden,
    plates_of,
    preserved_rng,
    prior,
    run,
    sample_nodes,
    subset,
)
from pvi.errors import DataError, GuideError, ModelError
from pvi.fit.entry import fit
from pvi.posterior import Posterior
from pvi.posterior.draws import Run, Runner
from pvi.posterior.psis import psis

LOG_JOINT = "log_joint"
Values = dict[str, np.ndarray]
Quantity = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Record:
    """What one simulation has found; `error` says why it has not.

    Args:
        values: "truth", "mean", "sd" and "pit" of each scalar, by site.
        reason: why the fit did not converge; empty otherwise.
        khat: tail index of the importance weights; NaN without them.
    """

    number: int
    values: dict[str, Values] = field(default_factory=dict)
    reason: str = ""
    khat: float = math.nan
    error: str = ""


@dataclass(frozen=True)
class Drawn:
    """A data set from the simulator, with the latents that made it.

    Args:
        model: the program to fit, conditioned on observations that are no argument.
        data: in place of the user's.
        truth: every latent and deterministic site.
        dims: names of the dimensions of each.
        named: arguments and observations by name, for test quantities.
        observed: names of the observations.
        latents: the model's trace on `truth`.
    """

    model: Program
    data: Data
    truth: dict[str, Tensor]
    dims: dict[str, tuple[str, ...]]
    named: dict[str, Any]
    observed: tuple[str, ...]
    latents: Any


@dataclass
class Task:
    """All that a simulation needs, so that another process can run it.

    Args:
        guide: a factory or a prototype, or `None`; unused with a `posterior`.
        posterior: of a trained amortised guide, which is put on each simulated data set.
        options: of `pvi.fit`.
    """

    model: Program
    simulator: Program
    guide: Any
    posterior: Posterior | None
    data: Data
    options: dict[str, Any]
    num_draws: int = 0
    correct: str | None = None
    quantities: dict[str, Quantity] = field(default_factory=dict)
    sites: tuple[str, ...] | None = None
    seed: int = 0
    log_joint: bool = True
    _plan: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_plan": None}

    def record(self, number: int) -> Record:
        """Run one simulation; whatever goes wrong in it is part of the result."""
        try:
            return self._record(number)
        except Exception as error:
            text = str(error).partition("\n")[0]
            return Record(number, error=f"{type(error).__name__}: {text}")

    def seeds(self, number: int) -> list[int]:
        """Of the data, the fit, the draws and the ties of one simulation."""
        return [int(s) for s in np.random.SeedSequence([self.seed, number]).generate_state(4)]

    @contextmanager
    def scope(self, seed: int | None = None) -> Iterator[None]:
        """Inside: the simulator's parameters, no gradients, evaluation mode, our own seed."""
        if self.posterior is not None:
            with self.posterior.drawing(seed):
                yield
            return
        params = Params(self.model, self.simulator)
        with params.scope(), params.evaluation(), torch.no_grad(), preserved_rng():
            if seed is not None:
                torch.manual_seed(seed)
            yield

    def posterior_of(self, drawn: Drawn, number: int) -> tuple[Posterior, str]:
        """The posterior for a data set, and why its fit did not converge."""
        data, rest = drawn.data.entries, {"args": drawn.data.args, "kwargs": drawn.data.kwargs}
        if self.posterior is not None:
            guide, params = self.posterior.guide, self.posterior.params
            caveats = self.posterior.reservations
            shared: Any = {"params": params, "caveats": caveats, "checked": True}
            return Posterior(drawn.model, guide, drawn.data, **shared), ""
        guide, seed = fresh(self.guide), self.seeds(number)[1]
        done = fit(drawn.model, guide, data, **rest, seed=seed, progress=False, **self.options)
        if done.reason == "interrupted":
            raise KeyboardInterrupt
        return done.posterior, "" if done.converged else done.reason

    def draw(self, number: int) -> Drawn:
        """Latents and data from the simulator.

        Raises:
            ModelError: the arguments that hold the observations enter the model elsewhere too.
        """
        with self.scope(self.seeds(number)[0]):
            return self._draw()

    def _draw(self) -> Drawn:
        args, kwargs = self.data.whole()
        made = simulate(self.simulator, args, kwargs)
        nodes = sample_nodes(made.trace)
        names = [n for n, node in nodes.items() if not node["infer"].get("was_observed")]
        latents = subset(made.trace, names)
        _check_whole(nodes)
        again = replayed(made)
        observed = {n: x for n, x in sample_nodes(again).items() if x["is_observed"]}
        truth = {n: nodes[n] for n in names} | deterministic_nodes(again)
        model = self.model
        if made.hidden:
            model = conditioned(model, {name: observed[name]["value"] for name in made.hidden})
        entries = dict(self.data.entries)
        numbered = sum(isinstance(key, int) for key in entries)
        for key in entries:
            entries[key] = made.args[key] if isinstance(key, int) else made.kwargs[key]
        rest = {k: v for k, v in made.kwargs.items() if k not in entries}
        data = Data(entries, made.args[numbered:], rest, self.data.names)
        named = data.named() | {name: node["value"] for name, node in observed.items()}
        return Drawn(
            model,
            data,
            {name: node["value"].detach().cpu() for name, node in truth.items()},
            {name: _dims(name, node) for name, node in truth.items()},
            named,
            tuple(observed),
            latents,
        )

    def _record(self, number: int) -> Record:
        drawn = self.draw(number)
        posterior, reason = self.posterior_of(drawn, number)
        _, _, seed, ties = self.seeds(number)
        draws = posterior.sample(self.num_draws, seed=seed)
        draws = {name: x.detach().cpu() for name, x in draws.items() if name in drawn.truth}
        truth = {name: drawn.truth[name] for name in draws}
        if self.log_joint:
            log_p = posterior.draws(self.num_draws, seed=seed).log_p.detach().cpu()
            draws[LOG_JOINT], truth[LOG_JOINT] = log_p, log_p.new_tensor(self.density(drawn))
        for name, quantity in self.quantities.items():
            draws[name], truth[name] = evaluated(name, quantity, draws, drawn, self.num_draws)
        weights, khat = torch.full((self.num_draws,), 1.0, dtype=torch.double), math.nan
        if self.correct:
            smooth = psis(posterior.log_weights(self.num_draws, seed=seed).cpu())
            weights, khat = smooth.log_weights.exp(), smooth.khat
        generator = torch.Generator().manual_seed(ties)
        wanted = self.wanted(truth)
        found = [summary(n, draws[n], truth[n], weights, generator) for n in wanted]
        keys = ("truth", "mean", "sd", "pit")
        values = {k: {n: x[k] for n, x in zip(wanted, found, strict=True)} for k in keys}
        return Record(number, values, reason, khat)

    def wanted(self, names: Mapping[str, Any]) -> list[str]:
        """The sites to rank, and all test quantities."""
        extra = {LOG_JOINT, *self.quantities}
        return [n for n in names if self.sites is None or n in self.sites or n in extra]

    def density(self, drawn: Drawn) -> float:
        """Log joint density of the truth and its data, nats, by the model that is fitted."""
        args, kwargs = drawn.data.whole()
        guide = prior(drawn.model)
        with self.scope():
            if self._plan is None:
                self._plan = make_plan(drawn.model, guide, args, kwargs, "joint", average=False)
            runner = Runner(drawn.model, guide, args, kwargs, self._plan)
            given = run(guide, args, kwargs, drawn.latents)
            for name in sample_nodes(given):
                if name not in drawn.truth:
                    raise ModelError(
                        f"the simulator has no site '{name}', which the model has: give it all"
                    )
            return float(Run(runner, 1, given).draws().log_p)


def summary(
    name: str, draws: Tensor, truth: Tensor, weights: Tensor, ties: torch.Generator
) -> dict[str, np.ndarray]:
    r"""Mean and sd of the draws, and the share of them below the truth, ties broken at random.

    .. math:: u = \frac{S\,(F_< + V F_=) + V}{S + 1}, \qquad V \sim U(0, 1)

    with :math:`F_<` and :math:`F_=` the weight of draws below and at the truth. If the truth is
    one more draw from the same distribution and the weights are equal, u is uniform, exactly;
    :math:`\lfloor (S + 1) u \rfloor` is the rank, from 0 to S.

    Args:
        draws: `(S, *shape)`.
        truth: `(*shape)`.
        weights: `(S,)`.
        ties: for V.

    Raises:
        DataError: a draw or the truth is not finite.
    """
    draws, truth = draws.double(), truth.double()
    bad = int((~draws.isfinite()).any(tuple(range(1, draws.dim()))).sum())
    if bad or not bool(truth.isfinite().all()):
        what = f"{bad} of {len(draws)} draws are" if bad else "the simulated value is"
        raise DataError(f"site '{name}': {what} not finite")
    size, weights = len(draws), weights / weights.sum()
    sides = (draws < truth, draws == truth)
    below, equal = (torch.tensordot(weights, side.double(), 1) for side in sides)
    noise = torch.rand(truth.shape, generator=ties, dtype=torch.double)
    pit = (size * (below + noise * equal) + noise) / (size + 1)
    mean = torch.tensordot(weights, draws, 1)
    variance = torch.tensordot(weights, (draws - mean) ** 2, 1)
    found = {"truth": truth, "mean": mean, "sd": variance.sqrt(), "pit": pit.clamp(0, 1 - 1e-12)}
    return {key: value.numpy() for key, value in found.items()}


def evaluated(
    name: str, quantity: Quantity, draws: Mapping[str, Tensor], drawn: Drawn, num: int
) -> tuple[Tensor, Tensor]:
    """A test quantity of each draw, `(S,)`, and of the truth.

    Raises:
        DataError: it is no single number.
    """
    values = []
    for latents in [drawn.truth, *({k: x[s] for k, x in draws.items()} for s in range(num))]:
        value = torch.as_tensor(quantity(latents, drawn.named)).detach().cpu().double()
        if value.numel() != 1:
            raise DataError(
                f"quantities['{name}'] must return one number, got shape {tuple(value.shape)}"
            )
        values.append(value.reshape(()))
    stacked = torch.stack(values)
    return stacked[1:], stacked[0]


def fresh(guide: Any) -> Any:
    """A guide that no fit has touched.

    Args:
        guide: a function without arguments that makes one; a class of `pvi.guides`; a module, which
            is copied; a Pyro program; or `None`.
    """
    if guide is None or isinstance(guide, type):
        return guide
    if isinstance(guide, nn.Module):
        return copy.deepcopy(guide)
    if not makes_guides(guide):
        return guide
    with pyro.get_param_store().scope():
        made = guide()
    if not callable(made):
        raise GuideError(
            f"the guide takes no arguments, so it was called to make a guide, but it returned "
            f"{type(made).__name__}. Return a guide; if it is one itself, pass lambda: guide."
        )
    return made


def makes_guides(guide: Any) -> bool:
    """Whether a callable can be called without arguments: then it is a factory."""
    try:
        inspect.signature(guide).bind()
    except (TypeError, ValueError):
        return False
    return True


def check_fixed(model: Program, args: tuple, kwargs: Mapping) -> None:
    """Refuse a model with parameters of its own: each fit would change the simulator too.

    Raises:
        ModelError: naming one of them.
    """
    params = Params(model)
    with params.scope(), hidden():
        run(model, args, kwargs)
    if trained := sorted(params.named()):
        raise ModelError(
            f"the model has parameters of its own ('{trained[0]}'), which every fit would train, "
            "so that data and fits come from different models. Pass a Fit with an amortised guide "
            "in place of the guide, or fix them (requires_grad_(False), or priors on them)."
        )


def _check_whole(nodes: Mapping[str, Any]) -> None:
    for name, node in nodes.items():
        for plate in plates_of(node):
            if plate.size < plate.full_size:
                raise ModelError(
                    f"site '{name}' is in plate '{plate.name}', of which the model draws "
                    f"{plate.size} of {plate.full_size} elements a call, so it makes no whole data "
                    "set. Write the plate over all rows, and pass batch_size= for minibatches."
                )


def _dims(name: str, node: Mapping) -> tuple[str, ...]:
    """Names of a site's dimensions: plates where there is one, else as in arviz."""
    shape, batch = node["value"].shape, node["value"].dim() - node["fn"].event_dim
    plates = {p.dim: p for p in plates_of(node)}
    found = [plates.get(i - batch) if i < batch else None for i in range(len(shape))]
    return tuple(
        f"{name}_dim_{i}" if plate is None or plate.size != size else plate.name
        for i, (plate, size) in enumerate(zip(found, shape, strict=True))
    )
