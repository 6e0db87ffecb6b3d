"""Adversaries of a fit: whose gradients go where, when, with which weight, and what they learn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pvi
from pvi.errors import FitError, ModelError, ObjectiveError
from pvi.fit.adversary import GAMES
from pvi.fit.arena import MOST
from pvi.models.vae import VAE, FactorVAE, Gaussian
from pvi.models.vae.factor import permuted
from pvi.nn import MLP
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(24).double() + 1.0
RATE, OWN_RATE = 0.01, 0.05


def sgd(rate: float) -> Callable[[list], torch.optim.Optimizer]:
    return lambda leaves: torch.optim.SGD(leaves, lr=rate)


def scorer(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))


def made(**options: Any) -> pvi.Adversary:
    return pvi.Adversary(scorer(), **{"optimizer": sgd(OWN_RATE), **options})


class Shift(nn.Module):
    """A mean w with a latent that says nothing; its fakes are w + 0, w + 1/n, ..."""

    def __init__(self, *adversaries: pvi.Adversary, w: nn.Parameter | None = None):
        super().__init__()
        self.adversaries = adversaries
        self.w = nn.Parameter(torch.zeros(())) if w is None else w

    def forward(self, x: Tensor) -> None:
        pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            for adversary in self.adversaries:
                adversary(fakes(self.w, len(x)), self.real(x))
            pyro.sample("x", dist.Normal(self.w, 1.0), obs=x)

    def real(self, x: Tensor) -> Any:
        return x.unsqueeze(-1)


def fakes(w: Tensor, n: int) -> Tensor:
    return (w + torch.arange(n) / n).unsqueeze(-1)


def guide(x: Tensor) -> None:
    pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))


def run(*adversaries: pvi.Adversary, w: nn.Parameter | None = None, **options: Any) -> pvi.Fit:
    options = {"steps": 4, "optimizer": sgd(RATE), "seed": 0, "objective": EXACT_KL, **options}
    return pvi.fit(Shift(*adversaries, w=w), guide, X, adversaries=adversaries, **options)


EXACT_KL = pvi.TraceMeanFieldELBO()


def end(fit: pvi.Fit) -> Tensor:
    return fit.model.w.detach()  # type: ignore[attr-defined]


def weights_of(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


BY_HAND: dict[str, tuple[Callable, Callable, Callable]] = {
    "hinge": (lambda s: (1 - s).clamp(min=0), lambda s: (1 + s).clamp(min=0), lambda s: -s),
    "ratio": (lambda s: -torch.sigmoid(s).log(), lambda s: -torch.sigmoid(-s).log(), lambda s: -s),
    "logistic": (
        lambda s: -torch.sigmoid(s).log(),
        lambda s: -torch.sigmoid(-s).log(),
        lambda s: -torch.sigmoid(s).log(),
    ),
    "squares": (lambda s: (s - 1) ** 2, lambda s: s**2, lambda s: (s - 1) ** 2 / 2),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("loss", GAMES)
def test_alternating_steps_are_those_of_a_loop_by_hand(loss: str, adaptive: bool) -> None:
    """Losses, weights, and both gradients: each network's step leaves the other alone."""
    real, fake, term = BY_HAND[loss]
    network, w, loc = scorer(), torch.zeros((), requires_grad=True), torch.tensor(0.5)
    n, weight, history = len(X), 0.7, []
    for _ in range(4):
        shown = fakes(w, n)
        ours = -dist.Normal(w, 1.0).log_prob(X).sum() + loc**2 / 2
        its = n * term(network(shown)).mean()
        a, b = (torch.autograd.grad(x, w, retain_graph=True)[0] for x in (ours, its))
        factor = weight * min(float(abs(a) / abs(b)), MOST) if adaptive else weight
        own = real(network(X.unsqueeze(-1))).mean() + fake(network(shown.detach())).mean()
        grads = torch.autograd.grad(own / 2, list(network.parameters()))
        history.append([x.item() for x in (ours + factor * its, own / 2, its / n)] + [factor])
        with torch.no_grad():
            w -= RATE * (a + factor * b)
            loc -= RATE * loc
            for p, grad in zip(network.parameters(), grads, strict=True):
                p -= OWN_RATE * grad
    leaf = nn.Parameter(torch.zeros(()))
    adversary = made(loss=loss, weight=weight, adaptive=leaf if adaptive else None)
    fit = run(adversary, w=leaf)
    assert torch.allclose(leaf.detach(), w, atol=EXACT)
    assert torch.allclose(weights_of(adversary.network), weights_of(network), atol=EXACT)
    names = ["loss", *(f"adversary/adversary/{x}" for x in ("loss", "term", "weight"))]
    found = np.stack([fit.history[name] for name in names], 1)
    assert np.allclose(found, history, atol=1e-8)


def test_the_programs_step_does_not_move_the_network() -> None:
    adversary = made(optimizer=sgd(0.0), weight=5.0)
    before = weights_of(adversary.network)
    with_term, plain = run(adversary), run()
    assert torch.equal(weights_of(adversary.network), before)
    assert abs(end(with_term) - end(plain)) > 0.01


def test_buffers_change_in_the_networks_own_steps_only() -> None:
    network = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    adversary = pvi.Adversary(network, optimizer=sgd(0.0))
    run(adversary, steps=4)
    assert int(network[1].num_batches_tracked) == 8  # real and fake


def small_vae(*, plain: bool = False) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    parts = {"likelihood": Gaussian(0.5), "hidden": (6,)}
    own = {"gamma": 0.0, "discriminator": discriminator}
    model = VAE(3, 2, **parts) if plain else FactorVAE(3, 2, **own, **parts)
    return model, randn(20, 3).double()


def test_weight_zero_is_the_plain_fit_bit_by_bit() -> None:
    """Though its network learns, with dropout and permutations of its own."""
    options = {"epochs": 3, "batch_size": 8, "seed": 0, "objective": pvi.ELBO(3), "compile": False}
    one, x = small_vae()
    before = weights_of(one.discriminator)
    one.fit(x, **options)
    two, _ = small_vae(plain=True)
    two.fit(x, **options)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    assert np.array_equal(one.result().history["loss"], two.result().history["loss"])
    assert not torch.equal(weights_of(one.discriminator), before)
    assert (one.result().history["adversary/total_correlation/weight"] == 0).all()
    assert one.result().posterior.caveats() == two.result().posterior.caveats()
    assert one.result().reason == two.result().reason


@pytest.mark.parametrize(("start", "unit"), [(4, "step"), (2, "epoch")])
def test_delayed_start(start: int, unit: Any) -> None:
    late = made(start=start, unit=unit, weight=5.0)
    before = weights_of(late.network)
    options = {"batch_size": 12, "plate": "data"}
    early, plain = run(late, steps=4, **options), run(steps=4, **options)
    assert torch.equal(weights_of(late.network), before)
    assert torch.equal(end(early), end(plain))
    assert "adversary/adversary/loss" not in early.history
    late = made(start=start, unit=unit, weight=5.0)
    fit = run(late, steps=6, **options)
    assert not torch.equal(weights_of(late.network), before)
    assert fit.history["adversary/adversary/weight"].tolist() == [0, 0, 0, 0, 5, 5]
    assert np.isnan(fit.history["adversary/adversary/term"]).tolist() == [True] * 4 + [False] * 2


def test_bound_evidence_and_validation_are_the_plain_ones() -> None:
    adversary, calls = made(weight=5.0), []
    adversary.network.register_forward_hook(lambda *_: calls.append(0))
    fit = run(adversary, validation_data=X[:7], validate_every=1)
    assert len(calls) == 3 * 4  # in a step: for the program, for real samples, for fakes
    w = end(fit)
    with fit.posterior.params.scope():
        loc = pyro.param("loc").detach()
    at_end = dist.Normal(w, 1.0).log_prob(X[:7]).sum() - loc**2 / 2
    assert fit.history["validation_bound"][-1] == pytest.approx(float(at_end), abs=1e-8)
    first = dist.Normal(0.0, 1.0).log_prob(X).sum() - 0.125
    assert fit.history["bound"][0] == pytest.approx(float(first), abs=1e-8)
    term = fit.history["adversary/adversary/term"]
    assert np.allclose(fit.history["penalty"], 5.0 * len(X) * term)
    assert np.allclose(fit.history["loss"], 5.0 * len(X) * term - fit.history["bound"])
    with fit.posterior.params.scope():
        bounds = [EXACT_KL.bound(Shift(*a), guide, X) for a in ((), (adversary,))]
    assert bounds[0] == bounds[1]


def test_what_a_fit_says() -> None:
    fit = run(made(name="critic"))
    (caveat,) = fit.posterior.caveats()
    assert "'critic'" in caveat and "not a bound" in caveat
    assert fit.diagnose(100).verdict == "not assessed"
    assert not fit.converged and "adversaries" in fit.reason
    assert "adversary_critic_loss" in fit.to_datatree(10, seed=0)["fit_history"]


@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_and_minibatches(vectorized: bool) -> None:
    """The mean of the term over draws, scaled to all data; the network sees all draws."""
    seen: list[Tensor] = []

    def sizes(fake: Tensor) -> Tensor:
        seen.append(fake)
        return fake

    adversary = made(weight=2.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            adversary(z.unsqueeze(-1), sizes)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def own(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + x, 1.0))

    objective = pvi.IWAE(5, vectorize_particles=vectorized)
    options = {"batch_size": 8, "steps": 2, "seed": 0, "optimizer": sgd(RATE)}
    fit = pvi.fit(model, own, X, objective=objective, adversaries=[adversary], **options)
    assert [tuple(x.shape) for x in seen] == [(40, 1)] * 2
    term = fit.history["adversary/adversary/term"]
    assert np.allclose(fit.history["penalty"], 2.0 * len(X) * term)


def test_accumulated_batches_make_one_step() -> None:
    adversary = made()
    fit = run(adversary, steps=3, batch_size=8, accumulate=3)
    term = fit.history["adversary/adversary/term"]
    assert np.allclose(fit.history["penalty"], len(X) * term)


def test_two_adversaries() -> None:
    one, two = made(name="one", weight=0.5), made(name="two", loss="squares")
    fit = run(one, two)
    terms = [fit.history[f"adversary/{name}/term"] for name in ("one", "two")]
    assert np.allclose(fit.history["penalty"], len(X) * (0.5 * terms[0] + terms[1]))


def test_bad_numbers_leave_the_networks_step_out() -> None:
    calls: list[int] = []

    def real(fake: Tensor) -> Tensor:
        calls.append(0)
        return fake * (math.nan if len(calls) == 2 else 1.0)

    class Program(Shift):
        def real(self, x: Tensor) -> Any:
            return real

    adversary = made()
    options = {"steps": 4, "optimizer": sgd(RATE), "seed": 0}
    fit = pvi.fit(Program(adversary), guide, X, adversaries=[adversary], **options)
    losses = fit.history["adversary/adversary/loss"]
    assert np.isnan(losses).tolist() == [False, True, False, False]
    assert weights_of(adversary.network).isfinite().all() and np.isfinite(fit.history["loss"]).all()
    assert any("step 2" in note and "'adversary'" in note for note in fit.notes)


def test_a_return_to_an_earlier_state_takes_the_network_along() -> None:
    """Its weights became infinite: the fit goes back, and the network with it."""
    adversary = made(weight=1.0)

    def break_it(step: Any) -> None:
        if step.step == 5:
            with torch.no_grad():
                next(adversary.network.parameters()).fill_(math.inf)

    fit = run(adversary, steps=12, callbacks=[break_it])
    assert any("went back" in note for note in fit.notes)
    assert weights_of(adversary.network).isfinite().all()
    assert math.isfinite(fit.history["loss"][-1])


def test_clipped() -> None:
    adversary = made(clip_norm=1e-3)
    before = weights_of(adversary.network)
    run(adversary, steps=1)
    moved = torch.linalg.vector_norm(weights_of(adversary.network) - before)
    assert float(moved) == pytest.approx(OWN_RATE * 1e-3, rel=1e-3)


def test_steps_are_not_compiled() -> None:
    fit = run(made(), optimizer="adam", compile="graph", steps=8)
    assert any("not compiled: the steps of adversaries" in note for note in fit.notes)


def test_the_ratio_is_the_total_correlation_of_a_gaussian() -> None:
    """$TC = -\\frac12 \\log(1 - \\rho^2)$; the log ratio is quadratic, so such a network has it."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.unbind(-1)
            return self.line(torch.stack([a, b, a * a, b * b, a * b], -1))

    rho, n = 0.8, 4000
    noise = randn(n, 2, seed=5).double()
    z = torch.stack([noise[:, 0], rho * noise[:, 0] + math.sqrt(1 - rho**2) * noise[:, 1]], -1)
    network = Quadratic()
    adversary = pvi.Adversary(network, loss="ratio", weight=0.0, lr=0.1)

    def model(x: Tensor) -> None:
        pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            adversary(x, permuted)

    def watched(x: Tensor) -> None:
        model(x)
        pyro.factor("none", pyro.param("w", torch.zeros(())) * 0.0)

    fit = pvi.fit(watched, guide, z, adversaries=[adversary], steps=300, seed=0)
    exact = -0.5 * math.log(1 - rho**2)
    estimates = fit.history["adversary/adversary/term"][-100:]
    log_ratio = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1, rho], [rho, 1]])).log_prob
    per_row = log_ratio(z) - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    error = float(per_row.std()) / math.sqrt(n)  # of the mean over these rows; 0.012 nats
    assert abs(estimates.mean() - exact) < 4 * error
    found = -network(z).squeeze(-1).detach()
    assert float((found - per_row).square().mean().sqrt()) < 0.15 * float(per_row.std())


def test_permuted_keeps_the_margins() -> None:
    z = randn(50, 3).double()
    other = permuted(z)
    assert torch.equal(other.sort(0).values, z.sort(0).values)
    together = {tuple(row) for row in z.tolist()}
    assert sum(tuple(row) in together for row in other.tolist()) < 5


def test_scores_of_patches_are_averaged() -> None:
    adversary = pvi.Adversary(MLP(4, 3, (5,)), loss="ratio")
    x = randn(6, 4).double()
    own, term = adversary.losses(x, x + 1)
    scores = adversary.network(x)
    assert torch.allclose(term, -scores.mean())
    hand = softplus(-adversary.network(x + 1)).mean() + softplus(scores).mean()
    assert torch.allclose(own, hand / 2)


def shared() -> tuple[pvi.Adversary, Any]:
    """A model that registers the network as its own."""
    adversary = made()

    def model(x: Tensor) -> None:
        pyro.module("mine", adversary.network)
        Shift(adversary)(x)

    return adversary, model


def test_refusals() -> None:
    with pytest.raises(FitError, match="steps= or epochs="):
        run(made(), steps=None, optimizer="adam")
    with pytest.raises(FitError, match="one name"):
        run(made(), made())
    with pytest.raises(FitError, match="must be a list"):
        pvi.fit(Shift(), guide, X, adversaries=made(), steps=2)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="saw nothing"):
        pvi.fit(Shift(), guide, X, adversaries=[made()], steps=2)
    with pytest.raises(FitError, match="'adversary', which this fit was not given"):
        pvi.fit(Shift(made()), guide, X, adversaries=[made()], steps=2)
    with pytest.raises(FitError, match="'adversary', which this fit was not given"):
        pvi.fit(Shift(made()), guide, X, steps=2)
    with pytest.raises(ModelError, match="event_dim=3"):
        run(made(event_dim=3))
    with pytest.raises(ModelError, match="last layer before the fakes"):
        run(made(adaptive=nn.Parameter(torch.zeros(()))))
    adversary, model = shared()
    with pytest.raises(FitError, match="belongs to a program and to the network"):
        pvi.fit(model, guide, X, adversaries=[adversary], steps=2)
    for wrong in ({"loss": "wgan"}, {"weight": -1.0}, {"unit": "day"}, {"start": math.nan}):
        with pytest.raises(FitError, match=next(iter(wrong))):
            made(**wrong)
    with pytest.raises(FitError, match="network with parameters"):
        pvi.Adversary(nn.Identity())


def test_adaptive_weights_refuse_score_gradients() -> None:
    leaf = nn.Parameter(torch.zeros(()))
    adversary = made(adaptive=leaf)

    def model(x: Tensor, shift: Shift = Shift(adversary, w=leaf)) -> None:  # noqa: B008
        pyro.module("shift", shift)
        pyro.sample("coin", dist.Bernoulli(0.5))
        shift(x)

    def coin(x: Tensor) -> None:
        guide(x)
        pyro.sample("coin", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))

    with pytest.raises(ObjectiveError, match="'coin'"):
        pvi.fit(model, coin, X, adversaries=[adversary], steps=2, objective=pvi.ELBO())
