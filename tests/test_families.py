"""What holds for every guide of `tests.families.GUIDES`: supports, densities, shapes, states."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.constraints as pyro_constraints
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, biject_to, constraints

import pvi
from pvi.engine.plan import make_plan
from pvi.guides import Guide
from tests.families import (
    GAUSSIAN,
    GUIDES,
    PLATES,
    TRAINED,
    make,
    perturbed,
    ready,
    world,
)
from tests.scenarios import Program, isolated, randn

EXACT = 1e-9
ROWS = 3  # of the data in the models of one site


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


# One example of every kind of constraint that has a bijection from unconstrained space, with the
# shape of an event.
SUPPORTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "_Real": (constraints.real, ()),
    "_IndependentConstraint": (constraints.independent(constraints.positive, 1), (2,)),
    "_GreaterThan": (constraints.greater_than(-1.5), ()),
    "_GreaterThanEq": (constraints.greater_than_eq(1.5), ()),
    "_LessThan": (constraints.less_than(2.0), ()),
    "_Interval": (constraints.interval(torch.tensor(-1.0), torch.tensor(2.0)), ()),
    "_HalfOpenInterval": (constraints.half_open_interval(-1.0, 2.0), ()),
    "_Simplex": (constraints.simplex, (4,)),
    "_CorrCholesky": (constraints.corr_cholesky, (3, 3)),
    "_Cat": (constraints.cat([constraints.real, constraints.positive], -1, [1, 2]), (3,)),
    "_CorrMatrix": (pyro_constraints.corr_matrix, (3, 3)),
    "_OrderedVector": (pyro_constraints.ordered_vector, (3,)),
    "_PositiveOrderedVector": (pyro_constraints.positive_ordered_vector, (3,)),
    "_SoftplusPositive": (pyro_constraints.softplus_positive, ()),
}
UNUSABLE = {"_Stack": "torch's StackTransform does not sum its Jacobian over the event"}
UNSAVED = {"_Cat": "Cat()"}  # no plain data: the guide needs a setup before load_state_dict


def test_supports_are_complete() -> None:
    assert {kind.__name__ for kind in biject_to._registry} == SUPPORTS.keys() | UNUSABLE.keys()
    stack: Any = biject_to(constraints.stack([constraints.real, constraints.positive], -1))
    u = torch.zeros(2)
    assert stack.log_abs_det_jacobian(u, stack(u)).shape == (2,)  # the reason still holds


def numbers(support: Any, shape: tuple[int, ...]) -> torch.Size:
    """The shape of an event in unconstrained space."""
    return torch.Size(biject_to(support).inverse_shape(torch.Size(shape)))


def site(support: Any, shape: tuple[int, ...]) -> Program:
    """A row z_i on the support for each x_i, with unconstrained numbers u_i ~ N(x_i, 1)."""
    transform = biject_to(support)
    dims = len(numbers(support, shape))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(support, (), shape))
            u = transform.inv(z)
            near = x.reshape(-1, *(1,) * dims).expand(u.shape[u.dim() - dims - 1 :])
            log_det = transform.log_abs_det_jacobian(u, z)
            batch = u.shape[: u.dim() - dims]
            pyro.factor("flat in u", -log_det.reshape(*batch, -1).sum(-1))
            pyro.sample("x", dist.Normal(u, 1.0).to_event(dims), obs=near)

    return model


def on(name: str, support: Any, shape: tuple[int, ...]) -> Guide:
    size = numbers(support, shape).numel()
    guide = make(name, size).bind(site(support, shape)).setup(randn(ROWS))
    return perturbed(guide)


def square(support: Any, z: Tensor) -> Tensor:
    """As many numbers of an event as it has degrees of freedom."""
    if support is constraints.simplex:
        return z[:-1]
    if support in (constraints.corr_cholesky, pyro_constraints.corr_matrix):
        rows, columns = torch.tril_indices(*z.shape, offset=-1)
        return z[rows, columns]
    return z.reshape(-1)


@cache
def log_det(kind: str) -> tuple[Tensor, Tensor]:
    """Points `(2, ROWS, *event)` in unconstrained space and the sum over rows of log |det J|."""
    support, shape = SUPPORTS[kind]
    event, transform = numbers(support, shape), biject_to(support)
    u = randn(2, ROWS, *event).double()

    def of(row: Tensor) -> Tensor:
        return square(support, transform(row.reshape(event))).reshape(-1)

    found: list[Any] = [jacobian(of, row.reshape(-1)) for row in u.reshape(-1, *event)]
    return u, torch.stack([torch.linalg.slogdet(j)[1] for j in found]).reshape(2, ROWS).sum(1)


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize("name", GUIDES)
class TestSupports:
    def test_draws_are_inside(self, name: str, kind: str) -> None:
        support, shape = SUPPORTS[kind]
        guide, x = on(name, support, shape), randn(ROWS)
        z = guide.sample(200, x)["z"]
        assert z.shape == (200, ROWS, *shape)
        assert bool(support.check(z).all())
        assert float(z.std(0).max()) > 0.01 or name == "Delta"
        assert guide.log_prob({"z": z}, x).isfinite().all() or name == "Delta"

    def test_change_of_variables(self, name: str, kind: str) -> None:
        """log q(t(u)) = log q_R(u) - log |det dt/du| with the same parameters."""
        if name == "Delta":
            pytest.skip("a point has no density")
        support, shape = SUPPORTS[kind]
        event, x = numbers(support, shape), randn(ROWS)
        guide = on(name, support, shape)
        real = on(name, constraints.independent(constraints.real, len(event)), event)
        state = dict(guide.named_parameters())
        with torch.no_grad():
            for key, parameter in real.named_parameters():
                parameter.copy_(state[key])
        u, jacobians = log_det(kind)
        found = guide.log_prob({"z": biject_to(support)(u)}, x)
        torch.testing.assert_close(
            found, real.log_prob({"z": u}, x) - jacobians, atol=1e-7, rtol=1e-7
        )


class TestDensity:
    @pytest.mark.parametrize("name", [n for n in GAUSSIAN if n in ("LowRank", "FullRank")])
    def test_is_the_normal_with_its_covariance(self, name: str) -> None:
        x = randn(4)
        guide: Any = ready(name, linear, x)
        draws = guide.sample(5)
        u = torch.cat([draws[n].reshape(5, -1) for n in guide.latents], -1)
        loc = torch.cat([getattr(guide.loc, n).reshape(-1) for n in guide.latents])
        expected = MultivariateNormal(loc, guide.covariance()).log_prob(u)
        torch.testing.assert_close(guide.log_prob(draws), expected, atol=EXACT, rtol=EXACT)

    @pytest.mark.parametrize("name", GAUSSIAN)
    def test_covariance_of_the_draws(self, name: str) -> None:
        """Whatever the family: the normal with the draws' moments has the guide's density."""
        x = randn(2)
        guide = ready(name, linear, x)
        draws = guide.sample(40_000, x)
        u = torch.cat([draws[n].reshape(len(draws[n]), -1) for n in guide.latents], -1)
        normal = MultivariateNormal(u.mean(0), u.T.cov())
        gap = guide.log_prob(draws, x).detach() - normal.log_prob(u)
        # The KL of a normal whose p(p+3)/2 parameters were fitted to n draws is about that / 2n
        count = u.shape[1] * (u.shape[1] + 3) / 2
        assert float(gap.abs().mean()) < 3 * math.sqrt(count / len(u))

    def test_of_a_flow(self) -> None:
        """log q = log N(eps) - log |det du/deps| by autograd."""
        x = randn(2)
        guide: Any = ready("Flow", linear, x)
        joint = guide._joint
        eps = randn(3, joint.loc.numel()).double()

        def draw(e: Tensor) -> Tensor:
            return joint.loc + joint.scale * joint.transform(e)

        u = torch.stack([draw(e) for e in eps])
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(-1)
        dets: list[Any] = [torch.linalg.slogdet(jacobian(draw, e))[1] for e in eps]
        values = {n: torch.stack([guide._layout.split(row)[n] for row in u]) for n in guide.latents}
        expected = normal - torch.stack(dets)
        torch.testing.assert_close(guide.log_prob(values), expected, atol=1e-7, rtol=1e-7)


def linear(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z + w.sum(-1), 1.0), obs=x)


TRIANGULAR = ("correlation", "within", "rows", "columns")


@pytest.mark.parametrize("name", TRAINED)
def test_every_parameter_has_a_gradient(name: str) -> None:
    x = randn(4)
    guide = ready(name, world, x)
    torch.manual_seed(0)
    pvi.ELBO(4, kl="exact").differentiable_loss(world, guide, x).backward()
    parameters = dict(guide.named_parameters())
    assert parameters
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        gradient, path = parameter.grad, key.split(".")
        if any(part.removesuffix("_unconstrained") in TRIANGULAR for part in path):
            rows, columns = torch.tril_indices(*gradient.shape[-2:], offset=-1)
            gradient = gradient[..., rows, columns]
        if "flow" in path:  # its masked weights have none
            assert bool(gradient.any()), key
        else:
            assert bool((gradient != 0).all()), key


@pytest.mark.parametrize("plates", PLATES)
@pytest.mark.parametrize("name", GUIDES)
class TestPlates:
    def setup(self, name: str, plates: str) -> tuple[Guide, Program, Tensor]:
        model, shape, _ = PLATES[plates]
        x = randn(*shape)
        if name == "Amortized" and plates in ("none", "outer"):
            pytest.skip("its encoder gives a row for each number of x")
        return ready(name, model, x), model, x

    def test_shapes(self, name: str, plates: str) -> None:
        guide, _, x = self.setup(name, plates)
        shapes = PLATES[plates][2]
        assert {n: tuple(v.shape) for n, v in guide(x).items()} == shapes
        for num in (1, 7):
            draws = guide.sample(num, x)
            assert {n: tuple(v.shape) for n, v in draws.items()} == {
                n: (num, *shape) for n, shape in shapes.items()
            }
            assert guide.log_prob(draws, x).shape == (num,)

    def test_particles_are_a_dimension(self, name: str, plates: str) -> None:
        guide, model, x = self.setup(name, plates)
        plan = make_plan(model, guide, (x,), {}, "joint")
        assert plan.vectorized, plan.reason
        for term in pvi.ELBO(3).terms(model, guide, x):
            assert term.per_particle().numel() % 3 == 0

    def test_density_is_that_of_the_engine(self, name: str, plates: str) -> None:
        guide, model, x = self.setup(name, plates)
        guide(x)  # its parameters are in Pyro's store now, as after training
        draws = pvi.Posterior(model, guide, x).draws(6, seed=0)
        found = guide.log_prob({n: draws.values[n] for n in guide.latents}, x)
        torch.testing.assert_close(found, draws.log_q, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("name", ["MeanField", "Delta", "Flow"])
def test_angles_keep_to_one_turn(name: str) -> None:
    """A density that repeats itself on the real line has no finite integral there."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.VonMises(torch.tensor(4.0), 1.0))
        pyro.sample("x", dist.Normal(a.sin(), 1.0), obs=x)

    guide = make(name).bind(model)
    guide.setup(torch.tensor(0.5))
    a = float(guide.mean()["a"])
    assert a == pytest.approx(4.0 - 2 * math.pi, abs=0.3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(3.0)
    assert float(guide.sample(1000)["a"].abs().max()) <= math.pi
    fit = pvi.fit(model, make(name), torch.tensor(0.5), steps=300, seed=0)
    if name != "Delta":
        turn = torch.linspace(-math.pi, math.pi, 10_001)
        log_p = torch.distributions.VonMises(4.0, 1.0).log_prob(turn)
        log_p = log_p + torch.distributions.Normal(turn.sin(), 1.0).log_prob(torch.tensor(0.5))
        log_z = float(log_p.logsumexp(0)) + math.log(2 * math.pi / 10_000)
        log_w = fit.posterior.log_weights(2000, seed=0)
        assert log_z - 0.5 < float(log_w.mean()) < log_z + 0.05
