"""What is looked at once and not at every step, and what such looks must not refuse or break."""

from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from pvi import schedules
from pvi.engine import refusals
from pvi.engine.data import as_data
from pvi.engine.plan import make_plan
from pvi.engine.schedules import Schedule
from pvi.errors import ModelError, ObjectiveError
from pvi.fit.minibatch import check_additive
from tests.scenarios import K, amortised_guide, gradients, local_model, mean_model, param, randn

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(6).double()


def log_mean(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - torch.tensor(float(len(log_w))).log()


def loss_and_gradients(objective: pvi.Objective) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    loss = objective.evaluate(local_model, amortised_guide, (X,)).loss
    return loss.detach(), gradients(loss)


class TestSchedules:
    ramp = schedules.linear(10, 0.0, 4.0)

    @pytest.mark.parametrize(
        ("rule", "expected", "kl"),
        [
            (pvi.FreeBits(ramp), pvi.FreeBits(2.0), "exact"),
            (
                pvi.FreeBits(ramp, "dimension", ["z"]),
                pvi.FreeBits(2.0, "dimension", ["z"]),
                "exact",
            ),
            (pvi.Capacity(ramp, ramp, ["z"]), pvi.Capacity(2.0, 2.0, ["z"]), "sample"),
            (pvi.BetaTC(ramp, site="z"), pvi.BetaTC(2.0, site="z"), "sample"),
        ],
        ids=str,
    )
    def test_rules_with_names(self, rule: Any, expected: Any, kl: Any) -> None:
        """A rule's names and choices stay, its schedules become numbers."""
        now = pvi.ELBO(K, kl=kl, weighting=rule).at(step=5)
        assert now.weighting == expected
        plain = pvi.ELBO(K, kl=kl, weighting=expected)
        torch.testing.assert_close(loss_and_gradients(now), loss_and_gradients(plain))

    def test_options_are_checked_once(self) -> None:
        """Not at every step: the check for kinks alone takes 81 second derivatives."""
        with mock.patch.object(refusals, "_is_smooth", return_value=True) as probe:
            objective = pvi.Objective(K, mean=log_mean, gradient="path", beta=self.ramp)
            times = [objective.at(step=t) for t in range(5)]
        assert probe.call_count == 1
        assert [now.beta for now in times] == [self.ramp.at(step=t) for t in range(5)]
        assert objective.beta is self.ramp

    def test_bad_weights_of_own_schedules(self) -> None:
        objective = pvi.BetaELBO({"z": Schedule("falling", lambda t: 1.0 - t)})
        assert objective.at(step=1).beta == {"z": 0.0}
        with pytest.raises(ObjectiveError, match=r"beta\['z'\] must be a finite number >= 0"):
            objective.at(step=2)


class TestSleep:
    def test_encoder_is_checked_once(self) -> None:
        """The guide runs once to wake and once to sleep; another guide is checked too."""
        calls = []

        def guide(x: Tensor) -> None:
            calls.append(x)
            amortised_guide(x)

        def blind(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(param("loc", 0.1), 1.0))

        objective = pvi.ReweightedWakeSleep(K, insomnia=0.5, vectorize_particles=True)
        for _ in range(3):
            calls.clear()
            objective.evaluate(local_model, guide, (X,))
        assert len(calls) == 2
        with pytest.raises(ObjectiveError, match="a guide that is a function of the data"):
            objective.evaluate(local_model, blind, (X,))


class TestEffectsOfGlobals:
    """Weight decay of a global latent that is drawn after the latents of the rows."""

    data = as_data(X, (), None, None)

    @staticmethod
    def decayed(x: Tensor) -> None:
        rows = pyro.plate("data", len(x))
        with rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pvi.penalty("decay", w**2)
        with rows:
            pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

    def test_fits(self) -> None:
        fit = pvi.fit(self.decayed, data=X, batch_size=2, steps=2, seed=0)
        assert len(fit.history["penalty"]) == 2

    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("rows", [False, True])
    def test_rows_are_refused(self, rows: bool, dropout: bool) -> None:
        """Of local latents as of data, also where noise keeps densities from being compared."""

        def model(x: Tensor) -> None:
            noise = torch.randn(()) if dropout else 0.0
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + noise, 1.0), obs=x)
            pvi.penalty("square", (z**2).sum() if rows else torch.as_tensor(noise) ** 2)

        plates = frozenset({"data"})
        if not rows:
            return check_additive(model, self.data, 2, plates)
        with pytest.raises(ModelError, match=r"pvi\.penalty 'square' depends on the batch's rows"):
            check_additive(model, self.data, 2, plates)


@pytest.mark.parametrize("batched", [True, False])
def test_path_with_an_own_mean_of_one_draw(batched: bool) -> None:
    """A mean of one log weight is that log weight."""
    own = pvi.Objective(1, mean=log_mean, gradient="path", vectorize_particles=batched)
    found, expected = (loss_and_gradients(o) for o in (own, pvi.ELBO(gradient="path")))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("odd", [0, 1])
def test_draws_are_no_points(odd: int) -> None:
    """Two looks differ also where the generator has kept one of a pair of normals for later."""
    torch.manual_seed(0)
    for _ in range(odd):
        torch.randn(())
    guide = AutoNormal(mean_model)
    guide(randn(5))
    torch.manual_seed(0)
    for _ in range(odd):
        torch.randn(())
    assert make_plan(mean_model, guide, (randn(5),), {}, "joint").points == frozenset()
