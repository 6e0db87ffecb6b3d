"""State that a captured step would not see change: a fit is the programs' fit all the same."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pvi
from pvi.compiled.capture import RUNS

pytestmark = pytest.mark.skipif(not RUNS, reason="this torch can't capture")

Y = torch.linspace(-1.0, 3.0, 10)
ARRAY = np.ones(2)
TEMPERATURE = 1.0


class Settings:
    scale = 1.0


def normal(scale: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, float(scale)))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([10]).to_event(1), obs=Y)


def of_array() -> None:
    normal(ARRAY[0])


def of_class() -> None:
    normal(Settings.scale)


def of_function() -> None:
    normal(getattr(of_function, "scale"))  # noqa: B009


def of_default(held: list[float] = [1.0]) -> None:  # noqa: B006
    normal(held[0])


def of_inner_code() -> None:
    normal(sum(x * TEMPERATURE for x in (1.0,)))


class Underscored(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self._scale = 1.0

    def forward(self) -> None:
        normal(self._scale)


class ReadsGlobal(PyroModule):
    def forward(self) -> None:
        normal(TEMPERATURE)


def set_global(x: float) -> None:
    global TEMPERATURE
    TEMPERATURE = x


UNDERSCORED = Underscored()
HIDDEN: dict[str, tuple[Any, Callable[[float], Any]]] = {
    "array": (of_array, lambda x: ARRAY.fill(x)),
    "class": (of_class, lambda x: setattr(Settings, "scale", x)),
    "function": (of_function, lambda x: setattr(of_function, "scale", x)),
    "default": (of_default, lambda x: of_default.__defaults__[0].__setitem__(0, x)),  # type: ignore
    "inner code": (of_inner_code, set_global),
    "underscored": (UNDERSCORED, lambda x: setattr(UNDERSCORED, "_scale", x)),
    "global of a method": (ReadsGlobal(), set_global),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_numbers_that_a_callback_changes(case: str) -> None:
    model, change = HIDDEN[case]
    losses = []
    for way in (False, "graph"):
        change(1.0)
        fit = pvi.fit(
            model,
            pvi.guides.MeanField,
            objective=pvi.ELBO(),
            optimizer="adam",
            steps=24,
            seed=0,
            progress=False,
            compile=way,
            callbacks=[lambda step: change(9.0 if step.step >= 18 else 1.0)],
        )
        losses.append(fit.history["loss"])
    change(1.0)
    assert "no longer compiled from step" in fit.notes[-1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


class Net(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.beta = 1.0

    def forward(self) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, self.beta))
        loc = self.net(mu.reshape(1)).expand(10)
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=Y)


def own_loop() -> tuple[Net, Any, Any]:
    torch.manual_seed(0)
    model = Net()
    guide = pvi.guides.MeanField(model).setup()
    program = pvi.ELBO()(model, guide)
    loss = pvi.compile(program, backend="graph")
    for _ in range(5):
        loss()
    assert loss.reason == "" and loss._made
    return model, program, loss


def same(program: Any, loss: Any) -> Tensor:
    found = []
    for module in (program, loss):
        torch.manual_seed(3)
        found.append(module())
    torch.testing.assert_close(*found)
    return found[1]


def test_a_number_annealed_in_a_loop_of_ones_own() -> None:
    model, program, loss = own_loop()
    model.beta = 3.0
    same(program, loss)
    assert "beta" in loss.reason


@pytest.mark.filterwarnings("ignore:.*not registered in the param store")
def test_a_parameter_that_is_replaced_or_frozen_in_a_loop() -> None:
    model, program, loss = own_loop()
    model.net.weight = nn.Parameter(torch.full((1, 1), 2.0))
    same(program, loss).backward()
    assert model.net.weight.grad is not None
    model.net.bias.requires_grad_(False).grad = None
    same(program, loss).backward()
    assert model.net.bias.grad is None


def test_a_copy_has_parameters_of_its_own() -> None:
    _, _, loss = own_loop()
    other = copy.deepcopy(loss)
    with torch.no_grad():
        for x in other.parameters():
            x.add_(0.5)
    for _ in range(4):
        torch.manual_seed(4)
        ours = other()
    torch.manual_seed(4)
    torch.testing.assert_close(ours, pvi.ELBO()(other.model, other.guide)())


def test_iterators_move_unseen() -> None:
    """The model counts its calls, which a captured step does not make."""

    def fitted(way: Any) -> pvi.Fit:
        calls = itertools.count()

        def model() -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            scale = 1.0 if next(calls) < 20 else 3.0
            pyro.sample("y", dist.Normal(mu, scale).expand([10]).to_event(1), obs=Y)

        guide, elbo = pvi.guides.MeanField, pvi.ELBO()
        options: dict[str, Any] = {"objective": elbo, "optimizer": "adam", "steps": 40, "seed": 0}
        return pvi.fit(model, guide, progress=False, compile=way, **options)

    plain, graph = fitted(False), fitted("graph")
    assert graph.notes == ("not compiled: 'calls' in the programs changes from step to step",)
    np.testing.assert_allclose(graph.history["loss"], plain.history["loss"], rtol=1e-6)
