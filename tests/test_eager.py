"""What steps leave out to be fast changes nothing that anybody could see."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import ExpTransform, constraints

import pvi
from pvi.engine.params import Params
from pvi.engine.reads import read
from pvi.engine.traces import run
from pvi.errors import FitError
from pvi.fit.faults import PERIOD, total_norm
from pvi.fit.schedule import Schedule
from pvi.fit.training import INTERVAL
from pvi.guides.normals import PlainNormal, Pushed

pytestmark = pytest.mark.usefixtures("isolated")
STEPS = 3 * PERIOD


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fitted(program: Any, guide: Any = None, y: Tensor | None = None, **options: Any) -> pvi.Fit:
    data = torch.linspace(0.5, 2.0, 8) if y is None else y
    options = {"optimizer": "adam", "steps": STEPS, "seed": 0, **options}
    return pvi.fit(program, guide, args=(data,), progress=False, compile=False, **options)


class TestChecks:
    """Pyro's checks of arguments and values."""

    @staticmethod
    def seen(prior: Any, guide: Any = None) -> list[bool]:
        """At which steps they are on."""
        found: list[bool] = []

        def watched(y: Tensor) -> None:
            found.append(dist.is_validation_enabled())
            scale = pyro.sample("scale", prior)
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(1.0, scale), obs=y)

        def clear(step: Any) -> None:
            if step.step == 1:
                del found[:-1]

        fitted(watched, guide, callbacks=[clear])
        assert dist.is_validation_enabled()
        return found[:STEPS]

    def test_where_states_are_kept(self) -> None:
        on = [i for i, checked in enumerate(self.seen(dist.HalfNormal(2.0))) if checked]
        assert on == [*range(INTERVAL), PERIOD, 2 * PERIOD, STEPS - 1]

    def test_always_where_draws_may_leave_their_support(self) -> None:
        def guide(y: Tensor) -> None:
            loc = pyro.param("loc", torch.tensor(1.0))
            pyro.sample("scale", dist.LogNormal(loc, 0.1))

        assert all(self.seen(dist.HalfNormal(2.0), guide))

    @pytest.mark.parametrize("asked", [None, True])
    def test_arguments_that_become_invalid_are_found(self, asked: bool | None) -> None:
        """With the density of a Gamma of a negative concentration, which is finite."""

        def gamma(y: Tensor) -> None:
            shape = pyro.param("shape", torch.tensor(1.0))
            pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Gamma(shape, 1.0, validate_args=asked), obs=y)

        try:
            fit = fitted(gamma, y=torch.full((8,), 1e-9), lr=0.05)
        except FitError as error:
            fit = error.fit  # type: ignore[attr-defined]
        found = [note for note in fit.notes if "concentration" in note]
        first = int(found[0].split(":")[0].removeprefix("step "))
        assert INTERVAL < first < PERIOD if asked else first == PERIOD + 1
        assert fit.posterior.params.tensors()["param:shape"].item() > 0.0


def test_parameters_with_gaps() -> None:
    """Torch's fused Adam goes wrong on them."""

    class Guide(nn.Module):
        def __init__(self, wide: bool):
            super().__init__()
            table = torch.linspace(0.0, 1.0, 12).reshape(4, 3)
            self.loc = nn.Parameter(table.clone()[:, 1] if wide else table[:, 1].contiguous())

        def forward(self, y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(self.loc, 0.1).to_event(1))

    def program(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu.sum(-1, keepdim=True), 1.0), obs=y)

    guides = [Guide(wide) for wide in (False, True)]
    assert not guides[1].loc.is_contiguous()
    for guide in guides:
        fitted(program, guide, steps=20)
    torch.testing.assert_close(guides[0].loc, guides[1].loc)


def test_transposed_gradients() -> None:
    """As those of compiled steps may be; torch's fused Adam goes wrong on them, too."""
    layer, gradient = nn.Linear(3, 2, bias=False), torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1, 1]])
    adam = Schedule(1, 10, None, 0.1, "adam").optimizer(Params(layer))
    assert adam.param_groups[0]["fused"]
    before, layer.weight.grad = layer.weight.detach().clone(), gradient.t()
    adam.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * gradient.t())


class Holder(PyroModule):
    def __init__(self) -> None:
        super().__init__("holder")
        self.scale = PyroParam(torch.tensor([0.5, 2.0, 3.0]), constraints.positive, 0)

    def forward(self, plate: Any = None) -> Tensor:
        self.direct = read(self, "scale")
        return self.direct


class TestRead:
    def test_the_same_number_and_gradient(self) -> None:
        holder = Holder()
        run(holder, (), {})  # now the store knows it
        run(holder, (), {}, params=False)
        assert torch.equal(holder.direct, holder.scale)
        (leaf,) = holder.parameters()
        (got,) = torch.autograd.grad(holder.direct.sum(), leaf)
        (want,) = torch.autograd.grad(holder.scale.sum(), leaf)
        assert torch.equal(got, want)

    def test_who_listens_hears_it(self) -> None:
        holder = Holder()
        for _ in range(2):
            assert "holder.scale" in poutine.trace(holder).get_trace().nodes
            assert "holder.scale" in run(holder, (), {}).nodes

    def test_rows_of_a_subsample(self) -> None:
        holder = Holder()
        holder()
        with pyro.plate("rows", 3, subsample=torch.tensor([2])):
            run(holder, (), {}, params=False)
        assert holder.direct.tolist() == pytest.approx([3.0])

    def test_a_value_put_in_place(self) -> None:
        holder = Holder()
        holder()

        class Ones(poutine.messenger.Messenger):
            def _pyro_param(self, msg: Any) -> None:
                msg["value"], msg["done"] = torch.ones(3), True

        with Ones():
            run(holder, (), {}, params=False)
        assert holder.direct.tolist() == [1.0, 1.0, 1.0]

    def test_the_store_is_right_where_both_differ(self) -> None:
        holder = Holder()
        holder()
        pyro.get_param_store()["holder.scale"] = torch.tensor([7.0, 8.0, 9.0])
        run(holder, (), {}, params=False)
        assert holder.direct.tolist() == pytest.approx([7.0, 8.0, 9.0])


class TestDensities:
    """Of guides' draws, from their noise."""

    @pytest.mark.parametrize("positive", [False, True])
    def test_value_and_gradient_are_those_of_torch(self, positive: bool) -> None:
        loc = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor([0.2, 3.0], dtype=torch.float64, requires_grad=True)
        found = []
        for ours in (True, False):
            fn: Any = (PlainNormal if ours else dist.Normal)(loc, scale).expand([4, 2])
            if positive:
                exp = ExpTransform(cache_size=1)
                fn = Pushed(fn, exp) if ours else dist.TransformedDistribution(fn, [exp])
            torch.manual_seed(0)
            z = fn.rsample()
            bound = (fn.log_prob(z) + z.square()).sum()
            found.append((z, bound, *torch.autograd.grad(bound, (loc, scale))))
            assert fn.batch_shape == (4, 2)
        torch.testing.assert_close(*found)

    def test_other_values(self) -> None:
        fn, plain = PlainNormal(torch.zeros(3), torch.ones(3)), dist.Normal(torch.zeros(3), 1.0)
        drawn = fn.rsample()
        for value in (drawn.clone(), drawn + 1.0, torch.ones(3)):
            assert torch.equal(fn.log_prob(value), plain.log_prob(value))

    def test_a_look_without_gradients_first(self) -> None:
        """What is recorded is not summed twice; the gradient must not get lost by that."""
        guide = pvi.guides.MeanField(model).setup(torch.ones(3))
        terms = pvi.ELBO().terms(model, guide, torch.ones(3))
        with torch.no_grad():
            known = terms.log_weights()
            assert not known.requires_grad
        assert terms.log_weights().requires_grad
        with torch.no_grad():
            assert not terms.items[0].per_particle().requires_grad
        torch.testing.assert_close(terms.log_weights().detach(), known)


def test_norm_of_mixed_kinds() -> None:
    parts = [torch.full((2, 2), 3.0), torch.tensor(4.0), torch.zeros(3)]
    want = torch.cat([p.flatten() for p in parts]).norm()
    torch.testing.assert_close(total_norm(parts), want)
    want = (want**2 + 1.0).sqrt()
    mixed = total_norm([*parts, torch.tensor(1.0, dtype=torch.float64)])
    torch.testing.assert_close(mixed, want, check_dtype=False)
