"""What holds for every model: random plates, events, masks, scales, subsamples and particles.

A random world is a list of sites in any of up to three plates; the mean of each is the sum of the
earlier ones that are in no plate besides its own. So plates come nested and crossed, with latents
at every level. All numbers, noise included, are tables whose rows can be chosen.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyro import poutine
from scipy.stats import norm
from torch import Tensor

import pvi
from tests.scenarios import EXACT, isolated, objective
from tests.tape import ROWS, Tape, at_random

EXAMPLES = 30
START = (0.4, -0.3, -0.2)  # of the guide: shift, weight of earlier sites, log scale
SELDOM = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
few = settings(derandomize=True, max_examples=EXAMPLES, deadline=None, database=None, **SELDOM)
more = settings(few, max_examples=2 * EXAMPLES)
Rows = dict[int, Tensor]


@dataclass(frozen=True)
class Variable:
    """One site: dimensions of its plates, size of its event (0: a scalar), scale."""

    name: str
    dims: frozenset[int]
    event: int
    scale: float
    observed: bool


@dataclass(frozen=True)
class World:
    """Variables in the model's order, sizes of the plates by dimension, and all numbers.

    Args:
        tables: by variable and kind, "noise" `(ROWS, *batch, *event)`, "mask" and "data".
    """

    variables: tuple[Variable, ...]
    sizes: dict[int, int]
    tables: dict[tuple[str, str], Tensor]

    @property
    def nesting(self) -> int:
        return max((-d for v in self.variables for d in v.dims), default=0)

    def changed(self, dim: int, change: Callable[[str, Tensor, int], Tensor]) -> "World":
        """Another world in which the tables along a plate are `change(kind, table, dim)`."""
        tables = dict(self.tables)
        for v in self.variables:
            for kind in ("noise", "mask", "data"):
                if dim in v.dims and (v.name, kind) in tables:
                    shift = 0 if kind == "mask" else bool(v.event)
                    tables[v.name, kind] = change(kind, tables[v.name, kind], dim - shift)
        return replace(self, tables=tables)

    def select(self, dim: int, rows: Tensor) -> "World":
        world = self.changed(dim, lambda kind, table, d: table.index_select(d, rows))
        return replace(world, sizes={**self.sizes, dim: len(rows)})

    def seen(self, rows: Rows) -> "World":
        """The tables of a minibatch; plates keep their sizes."""
        world = self
        for dim, chosen in rows.items():
            world = world.select(dim, chosen)
        return replace(world, sizes=self.sizes)


class Plates(dict):
    """The plates of one run, each made when it is first used."""

    def __init__(self, world: World, rows: Rows):
        super().__init__()
        self.world, self.rows = world, rows

    def __missing__(self, dim: int) -> Any:
        size, rows = self.world.sizes[dim], self.rows.get(dim)
        self[dim] = pyro.plate(f"plate{-dim}", size, subsample=rows, dim=dim)
        return self[dim]

    def around(self, variable: Variable) -> ExitStack:
        """The plates, scale and mask around one site."""
        stack, mask = ExitStack(), self.world.tables[variable.name, "mask"]
        for dim in sorted(variable.dims):
            stack.enter_context(self[dim])
        if variable.scale != 1.0:
            stack.enter_context(poutine.scale(scale=variable.scale))
        if not mask.all():
            stack.enter_context(poutine.mask(mask=mask))
        return stack


def centre(variable: Variable, values: dict[Variable, Tensor]) -> Tensor:
    """Sum of the earlier values that are in no other plate, ready for the event."""
    total = torch.zeros(())
    for earlier, value in values.items():
        if earlier.dims <= variable.dims:
            total = total + (value.sum(-1) if earlier.event else value)
    return total.unsqueeze(-1).expand(*total.shape, variable.event) if variable.event else total


def model(world: World, rows: Rows) -> None:
    values, world = {}, world.seen(rows)
    plates = Plates(world, rows)
    for v in world.variables:
        with plates.around(v):
            fn = dist.Normal(0.7 * centre(v, values), 1.0).to_event(bool(v.event))
            values[v] = pyro.sample(v.name, fn, obs=world.tables.get((v.name, "data")))


def guide(raw: Tensor, draw: Callable, world: World, rows: Rows) -> None:
    values, world = {}, world.seen(rows)
    plates = Plates(world, rows)
    for v in world.variables:
        if not v.observed:
            with plates.around(v):
                fn = dist.Normal(raw[0] + raw[1] * centre(v, values), raw[2].exp())
                noise = world.tables[v.name, "noise"]
                values[v] = draw(v.name, fn, event=int(v.event > 0), table=noise)


@st.composite
def worlds(draw: Callable, plates: int = 0, scaled: bool = True) -> World:
    """At least `plates` plates."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=plates, max_size=3))
    dims = range(-len(sizes), 0)
    variables = []
    for kind, low, high in (("z", 1, 3), ("x", 1, 2)):
        for i in range(draw(st.integers(low, high))):
            own = draw(st.sets(st.sampled_from(dims)) if sizes else st.just(set()))
            scale = draw(st.sampled_from((1.0, 0.5))) if scaled else 1.0
            event = draw(st.sampled_from((0, 2)))
            variables.append(Variable(f"{kind}{i}", frozenset(own), event, scale, kind == "x"))
    by_dim = dict(zip(reversed(dims), sizes, strict=True))
    masked = draw(st.sets(st.sampled_from([v.name for v in variables])))
    return World(tuple(variables), by_dim, _tables(variables, by_dim, masked))


def numbers(shape: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _tables(
    variables: list[Variable], sizes: dict[int, int], masked: set[str]
) -> dict[tuple[str, str], Tensor]:
    tables = {}
    for i, v in enumerate(variables):
        batch = [sizes[d] if d in v.dims else 1 for d in range(min(v.dims, default=0), 0)]
        event = [v.event] if v.event else []
        some = numbers(batch, 3 * i) > -0.4
        tables[v.name, "mask"] = some if v.name in masked else torch.ones_like(some)
        kind, rows = ("data", []) if v.observed else ("noise", [ROWS])
        tables[v.name, kind] = numbers(rows + batch + event, 3 * i + 1)
    return tables


def evaluate(bound: pvi.Objective, world: World, rows: Rows | None = None) -> Tensor:
    """Loss, bound and gradient on the world's noise."""
    tape, raw = Tape(world.nesting), torch.tensor(START, requires_grad=True)

    def taped(*args: Any) -> None:
        tape.start()
        guide(raw, tape.sample, *args)

    args = (world, rows or {})
    bound.evaluate(model, taped, args)  # makes the plan
    tape.rewind()
    value = bound.evaluate(model, taped, args)
    (grad,) = torch.autograd.grad(value.loss, raw)
    return torch.cat([torch.stack([value.loss.detach(), value.bound]), grad])


def assert_equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=EXACT, rtol=EXACT)


def with_plate(world: World, least: int) -> int:
    """A plate of at least so many rows that holds something."""
    dims = [d for v in world.variables for d in sorted(v.dims) if world.sizes[d] >= least]
    assume(dims)
    return dims[0]


# Drawn, not parameters of the tests: all of them would then see the same worlds.
bounds = st.sampled_from((1.0, 0.0))
gradients = st.sampled_from(("reparam", "path", "score"))


@more
@given(alpha=bounds, gradient=gradients, world=worlds(), num=st.integers(2, 4))
def test_loop_is_batch(alpha: float, gradient: Any, world: World, num: int) -> None:
    """Value and gradient on the same noise."""
    with isolated():
        batch, loop = (
            objective(alpha, num, gradient=gradient, vectorize_particles=v) for v in (True, False)
        )
        assert_equal(evaluate(batch, world), evaluate(loop, world))


@few
@given(world=worlds(), num=st.integers(1, 3), data=st.data())
def test_terms_add_up(world: World, num: int, data: Any) -> None:
    """To log p - log q as Pyro's traces compute them, scales, masks and subsamples included."""
    with isolated():
        rows = {d: torch.randperm(n)[: (n + 1) // 2] for d, n in world.sizes.items()}
        rows = {d: r for d, r in rows.items() if data.draw(st.booleans())}
        programs = (model, partial(guide, torch.tensor(START), at_random))
        bound = pvi.ELBO(num, vectorize_particles=True)
        bound.terms(*programs, world, rows)  # makes the plan
        torch.manual_seed(3)
        terms = bound.terms(*programs, world, rows)
        torch.manual_seed(3)
        many = (
            p if num == 1 else pyro.plate("k", num, dim=-1 - world.nesting)(p) for p in programs
        )
        pyro_model, pyro_guide = many
        q = poutine.trace(pyro_guide).get_trace(world, rows)
        p = poutine.trace(poutine.replay(pyro_model, trace=q)).get_trace(world, rows)
        total = terms.log_weights()
        assert total.shape == (num,)
        assert_equal(total.sum(), p.log_prob_sum() - q.log_prob_sum())
        kl = sum(terms.kl().values())
        assert_equal(terms.log_likelihood().mean() - kl, total.mean())


@few
@given(alpha=bounds, world=worlds(plates=1, scaled=False), num=st.integers(2, 3))
def test_minibatches_average_to_the_whole(alpha: float, world: World, num: int) -> None:
    """In value and gradient on the same noise; where weights can't be scaled, a refusal."""
    with isolated():
        dim = with_plate(world, 2)
        size = world.sizes[dim]
        bound = objective(alpha, num, vectorize_particles=True, gradient="reparam")
        batches = torch.randperm(size).split(2 if size == 4 else 1)
        whole = evaluate(bound, world)
        try:
            parts = [evaluate(bound, world, {dim: rows}) for rows in batches]
        except pvi.ObjectiveError as error:
            assert alpha != 1.0 and "is subsampled" in str(error)
            return
        assert_equal(torch.stack(parts).mean(0), whole)


@few
@given(world=worlds())
def test_exact_kl_is_the_mean(world: World) -> None:
    """Of the sampled one, on the same draws."""
    num = 1000
    with isolated():
        programs = (model, partial(guide, torch.tensor(START), at_random))
        weights = []
        for kl in ("sample", "exact"):
            bound = pvi.ELBO(num, kl=kl, vectorize_particles=True)
            bound.terms(*programs, world, {})
            torch.manual_seed(3)
            weights.append(bound.terms(*programs, world, {}))
        sample, exact = weights
        assert all(t.how == "exact" for t in exact if t.kind == "latent")
        difference = sample.log_weights() - exact.log_weights()
        tolerance = norm.isf(0.001 / (2 * EXAMPLES)) * difference.std() / num**0.5
        assert difference.mean().abs() <= tolerance + EXACT


@few
@given(alpha=bounds, world=worlds(plates=1), num=st.integers(1, 3))
def test_order_of_rows(alpha: float, world: World, num: int) -> None:
    """Rows of a plate can be permuted."""
    with isolated():
        dim = with_plate(world, 2)
        bound = objective(alpha, num, vectorize_particles=True)
        other = world.select(dim, torch.arange(world.sizes[dim]).flip(0))
        assert_equal(evaluate(bound, world), evaluate(bound, other))


@few
@given(alpha=bounds, world=worlds(plates=1), num=st.integers(1, 3), data=st.data())
def test_masking_is_dropping(alpha: float, world: World, num: int, data: Any) -> None:
    """A row that is masked in all its sites might as well not be there."""
    with isolated():
        dim = with_plate(world, 2)
        row = data.draw(st.integers(0, world.sizes[dim] - 1))
        keep = torch.arange(world.sizes[dim]) != row

        def mask(kind: str, table: Tensor, d: int) -> Tensor:
            return table & keep.reshape(-1, *[1] * (-1 - d)) if kind == "mask" else table

        bound = objective(alpha, num, vectorize_particles=True)
        dropped = world.select(dim, keep.nonzero().squeeze(1))
        assert_equal(evaluate(bound, world.changed(dim, mask)), evaluate(bound, dropped))
