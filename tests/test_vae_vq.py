"""The VQ-VAE: its bound three ways, the gradient and the codebook by hand, the prior, refusals."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import DataError, FitError, GuideError, ModelError, ObjectiveError
from pvi.models.vae import VQVAE, AutoregressiveModel, Gaussian
from pvi.models.vae.codes import Codes, Quantised, nearest
from pvi.nn import MADE
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
K, D, P, DIM = 3, 2, 2, 5


def made(**options: Any) -> VQVAE:
    torch.manual_seed(0)
    given: dict[str, Any] = {"grid": P, "hidden": (8,), "likelihood": Gaussian(0.7)}
    model = VQVAE(DIM, K, D, **{**given, **options})
    model.codebook.copy_(0.3 * randn(K, D, seed=4))
    return model


def data(n: int = 8) -> Tensor:
    return randn(n, DIM, seed=1).double()


def by_hand(model: VQVAE, x: Tensor) -> Tensor:
    """Log joint of each row with its nearest codes, under the uniform prior."""
    with torch.no_grad():
        z = model.encoder(x).reshape(len(x), D, P)
        far = [(z[..., p, None] - model.codebook.T).norm(dim=1) for p in range(P)]
        codes = torch.stack([distances.argmin(1) for distances in far])
        e = model.codebook[codes.T]  # (n, P, D)
        loc = model.decoder(e.transpose(1, 2).reshape(len(x), -1))
        return torch.distributions.Normal(loc, 0.7).log_prob(x).sum(1) - P * math.log(K)


OBJECTIVES = {
    "trace": pvi.ELBO(),
    "exact": pvi.TraceMeanFieldELBO(),
    "particles": pvi.ELBO(4),
    "loop": pvi.TraceMeanFieldELBO(3, vectorize_particles=False),
    "weights": pvi.IWAE(5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_elbos_are_the_one_by_hand(name: str) -> None:
    model, x = made().eval(), data()
    objective, expected = OBJECTIVES[name], by_hand(model, x)
    terms = objective.terms(model.model, model.guide, x)
    assert len(model.encode(x).unique()) > 1
    found = objective.bound(model.model, model.guide, x)
    assert found == pytest.approx(float(expected.sum()), abs=EXACT)
    assert float(terms.kl()["z"]) == pytest.approx(len(x) * P * math.log(K), abs=EXACT)
    halves = [objective.bound(model.model, model.guide, part) for part in x.split(4)]
    assert sum(halves) == pytest.approx(found, abs=EXACT)


def test_the_bound_is_below_the_evidence() -> None:
    """All 9 pairs of codes summed up."""
    model, x = made(), data()
    pairs = torch.tensor(list(product(range(K), repeat=P)))
    with torch.no_grad():
        log_p = model.decoded(model.codebook[pairs].unsqueeze(1)).log_prob(x) - P * math.log(K)
        exact, chosen = log_p.logsumexp(0), by_hand(model, x)
        assert (
            abs(float(model.prior_codes().log_prob(model.codebook[pairs]).exp().sum()) - 1) < 1e-9
        )
    assert bool((chosen <= exact).all()) and float((exact - chosen).max()) > 0.1
    assert bool((log_p - chosen).abs().min(0)[0].max() < EXACT)  # it is one of the summands


def test_the_straight_through_gradient() -> None:
    """The encoder's is that of the decoder's input, and of the commitment."""
    model, x = made(commitment=0.4), data()
    kept = model.codebook.clone()
    loss = pvi.TraceMeanFieldELBO().evaluate(model.eval().model, model.guide, (x,)).loss
    loss.backward()
    assert torch.equal(model.codebook, kept)  # in evaluation mode, also with gradients
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    z = model.encodings(x)
    e = model.codebook[nearest(z, model.codebook)].clone().requires_grad_()
    likelihood = model.decoded(e).log_prob(x).sum()
    (slope,) = torch.autograd.grad(likelihood, e)
    surrogate = (slope * z).sum() - 0.4 * (z - e.detach()).square().sum()
    (-surrogate).backward()
    expected = {n: p.grad for n, p in model.encoder.named_parameters() if p.grad is not None}
    assert expected and "codebook" not in found
    for name, grad in expected.items():
        assert torch.allclose(found[f"encoder.{name}"], grad, atol=EXACT), name


def test_commitment_is_a_penalty_and_no_part_of_the_bound() -> None:
    model, x = made(commitment=0.4, decay=0.999, revive=0.0), data()
    before = made(commitment=0.4)
    fit = model.fit(x, batch_size=8, steps=1, lr=1e-9, seed=0, compile=False).result()
    before.codebook.copy_(model.codebook)  # which moves before it is used
    h = {name: float(fit.history[name][0]) for name in fit.history}
    z = before.encodings(x).detach()
    far = (z - before.codebook[nearest(z, before.codebook)]).square().sum()
    assert h["penalty"] == pytest.approx(0.4 * float(far), rel=1e-6)
    assert h["bound"] == pytest.approx(float(by_hand(before, x).sum()), rel=1e-6)
    assert h["loss"] == pytest.approx(-h["bound"] + h["penalty"], rel=1e-9)


def test_the_codebook_moves_to_running_means() -> None:
    """A loop over codes; the third is idle and is put at an encoding."""
    model, z = made(decay=0.9, revive=0.5), randn(6, P, D, seed=3).double()
    model.codebook.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [50.0, 50.0]]))
    model.counts.copy_(torch.tensor([2.0, 5.0, 0.1]))
    old, flat = model.codebook.clone(), z.reshape(-1, D)
    codes = (flat.unsqueeze(1) - old).norm(dim=-1).argmin(1)
    assert codes.bincount(minlength=3)[2] == 0 and len(codes.unique()) == 2
    model.learn(z)
    for k, before in ((0, 2.0), (1, 5.0)):
        mine = flat[codes == k]
        count = 0.9 * before + 0.1 * len(mine)
        mean = (0.9 * before * old[k] + 0.1 * mine.sum(0)) / count
        assert float(model.counts[k]) == pytest.approx(count, abs=EXACT)
        assert torch.allclose(model.codebook[k], mean, atol=EXACT)
    assert bool((flat == model.codebook[2]).all(1).any())
    assert float(model.counts[2]) == 4.0  # the mean: 12 encodings of 3 codes


@pytest.mark.parametrize("compile", [False, "graph"])
def test_only_steps_of_a_fit_move_the_codebook(compile: Any) -> None:
    """Running counts after t steps of n encodings are n (1 - decay^t)."""
    model, x = made(decay=0.9, revive=0.0), data()
    fit = model.fit(x, batch_size=8, steps=5, seed=0, validation_data=x, compile=compile).result()
    assert float(model.counts.sum()) == pytest.approx(8 * P * (1 - 0.9**5), abs=EXACT)
    kept = model.codebook.clone()
    pvi.ELBO(3).bound(model.model, model.guide, x)
    pvi.ELBO().explain(model.model, model.guide, x)
    fit.posterior.sample(2)
    model.reconstruct(x)
    assert torch.equal(kept, model.codebook)


def clusters() -> Tensor:
    centres = torch.tensor(list(product((-2.0, 2.0), repeat=3)))
    return centres.repeat(16, 1) + 0.1 * randn(128, 3, seed=5)


def clustered(revive: float, **options: Any) -> VQVAE:
    torch.manual_seed(0)
    networks: dict[str, Any] = {"encoder": nn.Identity(), "decoder": nn.Linear(3, 3)}
    model = VQVAE(3, 8, 3, grid=1, likelihood=Gaussian(0.2), revive=revive, **networks)
    model.codebook[1:] += 100.0
    return model.fit(clusters(), **{"batch_size": 32, "steps": 250, "seed": 0, **options})


def test_dead_codes_are_revived() -> None:
    """Eight clusters and eight codes, all but one of them far away at the start."""
    with pytest.raises(FitError, match="call fit first"):
        made().perplexity()
    x, alive, dead = clusters(), clustered(0.3), clustered(0.0)
    assert dead.perplexity(x) == 1.0
    assert alive.perplexity(x) > 5.0 and alive.perplexity() > 5.0  # two of one cluster may stay
    codes = alive.encode(x)
    uses = torch.bincount(codes.flatten(), minlength=8).double() / 128
    entropy = -sum(float(u) * math.log(float(u)) for u in uses if u > 0)
    assert alive.perplexity(x) == pytest.approx(math.exp(entropy))


def stop(step: Any) -> None:
    if step.step == 7:
        raise RuntimeError


def test_repeatable_and_resumed_bit_by_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "checkpoint": tmp_path, "every": 4, "compile": False}
    whole, again = (clustered(0.3, steps=12, compile=False) for _ in range(2))
    assert torch.equal(whole.codebook, again.codebook)
    with pytest.raises(RuntimeError):
        clustered(0.3, callbacks=[stop], **options)
    resumed = clustered(0.3, **options)
    assert np.array_equal(resumed.result().history["bound"], whole.result().history["bound"])
    assert torch.equal(resumed.codebook, whole.codebook)
    assert torch.equal(resumed.counts, whole.counts)


def test_compiled_steps_are_those_of_the_programs() -> None:
    plain, graph = (clustered(0.3, steps=40, compile=how) for how in (False, "graph"))
    assert any("compiled from step" in note for note in graph.result().notes)
    assert torch.allclose(plain.codebook, graph.codebook, atol=1e-8)
    assert not torch.equal(clustered(0.3, steps=1).codebook, plain.codebook)


def convolutional() -> tuple[VQVAE, Tensor]:
    torch.manual_seed(0)
    model = VQVAE((1, 8, 8), 4, 3, channels=(4, 4))
    x = (randn(40, 1, 8, 8, seed=2).cumsum(-1) > 0).double()
    return model.fit(x, batch_size=20, steps=15, seed=0), x


def test_a_prior_over_codes() -> None:
    """It takes the place of log K in the bound, and new data are drawn with it."""
    model, x = convolutional()
    rest = {name: p.clone() for name, p in model.state_dict().items()}
    codes = model.encode(x)
    assert codes.shape == (40, 2, 2) and model.reconstruct(x).shape == x.shape
    uniform = pvi.ELBO().bound(model.model, model.guide, x)
    model.fit_prior(x, batch_size=40, steps=150, lr=0.02, seed=0)
    assert isinstance(model.prior, AutoregressiveModel) and model.prior.shape == (1, 2, 2)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in rest.items())
    log_p = model.prior.score_samples(codes.unsqueeze(1).double()).log_evidence
    expected = uniform + float(log_p.sum()) + 40 * 4 * math.log(4)
    for objective in (pvi.ELBO(), pvi.TraceMeanFieldELBO(2)):
        found = objective.bound(model.model, model.guide, x)
        assert found == pytest.approx(expected, abs=1e-8)
    assert expected > uniform + 10.0
    torch.manual_seed(0)
    drawn = model.prior_codes().sample((2000,))
    drawn = nearest(drawn, model.codebook)
    everything = torch.tensor(list(product(range(4), repeat=4)))
    p = model.prior.score_samples(everything.reshape(-1, 1, 2, 2)).log_evidence.exp()
    shares = (drawn.unsqueeze(1) == everything).all(-1).double().mean(0)
    assert bool(((shares - p).abs() < 5.0 * (p * (1 - p) / 2000).sqrt() + 1e-3).all())
    assert model.sample(3, seed=0).shape == (3, 1, 8, 8)


def test_prior_of_ones_own_network_and_saving(tmp_path: Path) -> None:
    model, x = made(), data()
    network = MADE((P,), K, (6,), features=K)
    model.fit_prior(x, network=network, steps=3, batch_size=8, seed=0)
    model.save(tmp_path / "model")
    again = VQVAE.load(tmp_path / "model")
    bounds = [pvi.ELBO().bound(m.model, m.guide, x) for m in (model, again)]
    assert bounds[0] == bounds[1] and torch.equal(again.codebook, model.codebook)
    assert torch.equal(again.sample(4, seed=1), model.sample(4, seed=1))


def test_distributions_over_the_codebook() -> None:
    codebook = randn(K, D, seed=4).double()
    codebook[2] = codebook[1] + 1e-9  # nearly the same code
    prior = Codes(codebook, P)
    assert prior.log_prob(codebook[[2, 1]]).item() == pytest.approx(-P * math.log(K))
    assert prior.log_prob(codebook[[0, 0]] + 0.1).item() == -math.inf
    assert prior.support.check(prior.sample((7,))).all() and prior.sample((7,)).shape == (7, P, D)
    z = codebook[[2, 0]].unsqueeze(0) + 1e-12
    q = Quantised(z.requires_grad_(), codebook)
    assert q.codes.tolist() == [[2, 0]] and torch.equal(q.rsample((3,))[1, 0], codebook[[2, 0]])
    assert q.log_prob(q.rsample()).tolist() == [0.0]
    assert q.log_prob(codebook[[1, 0]]).tolist() == [-math.inf]


def test_what_means_nothing_is_refused_or_said() -> None:
    model, x = made(), data()
    fit = model.fit(x, batch_size=8, steps=2, seed=0).result()
    for call in (model.score_samples, model.score):
        with pytest.raises(
            ObjectiveError, match=r"one value at discrete site 'z'.*Report the bound"
        ):
            call(x)
    with pytest.raises(ObjectiveError, match="one value at discrete site"):
        fit.sandwich()
    with pytest.raises(ObjectiveError, match="one value at discrete site"):
        pvi.loo(fit)
    diagnosis = fit.diagnose(num_draws=50)
    assert diagnosis.verdict == "not assessed" and "one value at discrete site" in str(diagnosis)
    for gradient in ("path", "score"):
        with pytest.raises(ObjectiveError, match="straight-through"):
            model.fit(x, steps=1, objective=pvi.ELBO(2, gradient=gradient))  # type: ignore[arg-type]
    with pytest.raises(GuideError, match="discrete"):
        pvi.fit(model.model, pvi.guides.MeanField, x, steps=1)
    with pytest.raises(ModelError, match="discrete"):
        pvi.nuts(fit)
    text = str(pvi.ELBO().explain(model.model, model.guide, x))
    assert "straight-through (z): the guide's gradient is biased" in text
    assert "no bound: commitment" in text and "not a bound" not in text


def test_latents_and_arviz() -> None:
    """The information of codes is their entropy: the guide draws nothing else."""
    model, x = made(), data(40)
    fit = model.fit(x, batch_size=40, steps=2, seed=0).result()
    found = pvi.latents(fit, num_draws=40)["z"]
    shares = torch.unique(model.encode(x), dim=0, return_counts=True)[1] / 40
    assert found.kl == pytest.approx(P * math.log(K), abs=EXACT)
    assert found.information == pytest.approx(float(torch.special.entr(shares).sum()), abs=1e-6)
    assert fit.to_arviz(3).posterior["z"].shape == (1, 3, 40, P, D)


def test_wrong_arguments() -> None:
    model = made()
    for codes in (torch.full((2, P), K), torch.zeros(2, P), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(DataError, match=r"from 0 to 2 of shape \(N, 2\)"):
            model.decode(codes)
    assert model.decode(torch.zeros(4, P, dtype=torch.long)).shape == (4, DIM)
    with pytest.raises(ModelError, match="decay"):
        made(decay=1.0)
    with pytest.raises(ModelError, match="commitment"):
        made(commitment=-1.0)
    with pytest.raises(ModelError, match="num_codes"):
        VQVAE(DIM, 1, 2, grid=P)
    with pytest.raises(ModelError, match="images"):
        VQVAE(DIM, 4)
