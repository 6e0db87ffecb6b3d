"""Sums over discrete sites that are refused, each with the sites and what to do."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pvi
from tests.enumerated import MARK, PROBS, X, k_guide, nothing
from tests.scenarios import randn

pytestmark = pytest.mark.usefixtures("isolated")


def _scaled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def _subsampled(x: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(k, 1.0), obs=x[rows])


def _sequential(x: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
    pyro.sample("x", dist.Normal(k, 1.0), obs=x[0])


def _continuous(x: Tensor) -> None:
    k = pyro.sample("k", dist.Normal(0.0, 1.0), infer=MARK)
    pyro.sample("x", dist.Normal(k, 1.0), obs=x[0])


def _crossed(x: Tensor) -> None:
    a, b = pyro.plate("a", 2, dim=-1), pyro.plate("b", 2, dim=-2)
    with a:
        k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
    with b:
        j = pyro.sample("j", dist.Bernoulli(0.3), infer=MARK)
    with a, b:
        pyro.sample("x", dist.Normal(k + j, 1.0), obs=randn(2, 2))


def _branching(x: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
    pyro.sample("x", dist.Normal(1.0 if k else 0.0, 1.0), obs=x[0])


def _mixing(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
    pyro.sample("x", dist.Normal(k.sum(), 1.0), obs=x[0])


def _escaping(x: Tensor) -> None:
    with pyro.plate("groups", 2):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={**MARK, "expand": True})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(k[..., torch.tensor([0, 1, 1])], 1.0), obs=x)


REFUSED: dict[str, tuple[Callable, str]] = {
    "scale": (_scaled, "poutine.scale differs between sites 'k' and 'x'"),
    "subsample": (_subsampled, "plate 'data' is subsampled .2 of 3. at site 'x' inside the sum"),
    "sequential": (_sequential, "site 'k' is marked .*Mark it infer=..enumerate.: .parallel"),
    "continuous": (_continuous, "site 'k' is marked .* values of its Normal can't be listed"),
    "crossed": (_crossed, "the sum over 'k, j' couples crossed plates"),
    "branching": (_branching, "'k' is enumerated.*can't run on that"),
    "mixing": (_mixing, "site 'x' has another log density where all values of 'k' come at once"),
    "escaping": (_escaping, "site 'x' depends on 'k', which is enumerated inside plate 'groups'"),
}


class TestRefusals:
    @pytest.mark.parametrize("num", [1, 3])
    @pytest.mark.parametrize("name", REFUSED)
    def test_model(self, name: str, num: int) -> None:
        model, message = REFUSED[name]
        with pytest.raises((pvi.ObjectiveError, pvi.ModelError), match=message):
            pvi.ELBO(num).loss(model, nothing, X)

    @pytest.mark.parametrize("name", REFUSED)
    def test_fit(self, name: str) -> None:
        """A fit finds them before the first step."""
        model, message = REFUSED[name]
        with pytest.raises((pvi.ObjectiveError, pvi.ModelError), match=message):
            pvi.fit(model, nothing, X, steps=1)

    def test_unmarked(self) -> None:
        model = poutine.infer_config(_branching, lambda site: {"enumerate": None})
        with pytest.raises(pvi.GuideError, match='"parallel"} in the model sums it out'):
            pvi.ELBO().loss(model, nothing, X)

    def test_guide_inside_a_sum(self) -> None:
        def model(x: Tensor) -> None:
            j = pyro.sample("j", dist.Bernoulli(0.5), infer=MARK)
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(PROBS))
                pyro.sample("x", dist.Normal(j + k, 1.0), obs=x)

        with pytest.raises(pvi.ObjectiveError, match="runs over plate 'data', in which the guide"):
            pvi.ELBO().loss(model, k_guide, X)

    def test_drawn_below_the_guides_sum(self) -> None:
        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
                pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k))

        def model(x: Tensor) -> None:
            guide(x)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0])

        with pytest.raises(pvi.ObjectiveError, match="guide site 'j' is drawn for every value"):
            pvi.ELBO().loss(model, guide, X)

    def test_dropout_is_no_mixing(self) -> None:
        network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5))

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.5), infer=MARK)
                pyro.sample("x", dist.Normal(network(k.unsqueeze(-1)).sum(-1), 1.0), obs=x)

        assert math.isfinite(pvi.ELBO().loss(model, nothing, X))

    def test_marks_that_come_later(self) -> None:
        """Where no argument tells that the sites changed, a marked site is not drawn silently."""
        marked: list[dict[str, Any]] = [{}]

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(PROBS))
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                logits = pyro.param("logits", torch.zeros(3, 2))
                pyro.sample("k", dist.Categorical(logits=logits), infer=marked[0])

        objective = pvi.ELBO()
        objective.loss_and_grads(model, guide, X)
        marked[0] = MARK
        with pytest.raises(pvi.ObjectiveError, match=r"'k' is marked .* was not in the first run"):
            objective.loss_and_grads(model, guide, X)
        assert math.isfinite(pvi.ELBO().loss_and_grads(model, guide, X))
