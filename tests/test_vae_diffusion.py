"""Variational diffusion: the one-term estimator against all T terms, and both against algebra."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import CheckpointError, DataError, ModelError
from pvi.models.vae import (
    VAE,
    Categorical,
    DiffusionVAE,
    DiscretizedLogistic,
    Gaussian,
    KLAutoencoder,
    NoiseSchedule,
)
from pvi.nn import MLP, DenoisingMLP, UNet

EXACT, TRACE = pvi.TraceMeanFieldELBO(), pvi.ELBO()


def bits(n: int = 12, d: int = 3) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(n, d) < 0.7).float()


def made(x: Tensor, seed: int = 0, **options: object) -> DiffusionVAE:
    """Networks that are away from their start."""
    torch.manual_seed(seed)
    model = DiffusionVAE(tuple(x.shape[1:]), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def mean_se(values: list[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / math.sqrt(len(x)))


def unrolled(model: DiffusionVAE, x: Tensor, objective: pvi.Objective, n: int) -> tuple:
    programs = model.unrolled_model, model.unrolled_guide
    return mean_se([objective.bound(*programs, x) / len(x) for _ in range(n)])


def same(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert abs(a[0] - b[0]) < 4 * math.hypot(a[1], b[1])
    assert math.hypot(a[1], b[1]) < 0.05 * abs(a[0])  # otherwise all would be the same


CASES = {
    "bits": {"steps": 5},
    "one step": {"steps": 1},
    "own decoder": {"steps": 3, "decoder": MLP(3, 3, (8,))},
    "fixed noise": {"steps": 4, "schedule": NoiseSchedule(-3.0, 2.0, learned=False)},
}


@pytest.mark.parametrize("name", CASES)
def test_one_term_is_the_mean_of_all_terms(name: str) -> None:
    x = bits()
    model = made(x, **CASES[name])  # type: ignore[arg-type]
    with torch.no_grad():
        estimate = model.bound(x, num_samples=200, seed=0)
        same(estimate, unrolled(model, x, EXACT, 60))
        same(estimate, unrolled(model, x, TRACE, 60))
        same(estimate, mean_se([TRACE.bound(model.model, model.guide, x) / 12 for _ in range(200)]))


def test_gradients_agree() -> None:
    """Those of the noise schedule too: the objective depends on it through every term."""
    x = bits()
    model = made(x, steps=3)
    found = []
    for programs, n in (
        ((model.model, model.guide), 300),
        ((model.unrolled_model, model.unrolled_guide), 100),
    ):
        loss = EXACT(*programs)
        rows = []
        for _ in range(n):
            model.zero_grad()
            loss(x).backward()
            rows.append(torch.cat([_flat(p) for p in model.schedule.parameters()]))
        found.append(torch.stack(rows))
    means = [rows.mean(0) for rows in found]
    se = sum(rows.var(0) / len(rows) for rows in found).sqrt()  # type: ignore[union-attr]
    assert float(((means[0] - means[1]).abs() / se.clamp(min=1e-6)).max()) < 4.5
    assert float((means[0].abs() / se.clamp(min=1e-6)).max()) > 10


def _flat(p: nn.Parameter) -> Tensor:
    return torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone()


def test_gaussian_data_in_closed_form() -> None:
    """With the best guess for N(0, 1), alpha z, each term of the ELBO is known for each datum."""

    class Best(nn.Module):
        def forward(self, z: Tensor, level: Tensor) -> Tensor:
            return torch.zeros_like(z)  # y = alpha z - sigma v

    torch.manual_seed(0)
    x, steps = torch.randn(50, 2), 60
    schedule = NoiseSchedule(-4.0, 5.0, learned=False)
    gaussian = Gaussian("decoded")
    model = DiffusionVAE(2, steps, network=Best(), likelihood=gaussian, schedule=schedule)
    gamma = torch.linspace(-4.0, 5.0, steps + 1, dtype=torch.float64)
    signal, noise, snr = torch.sigmoid(-gamma), torch.sigmoid(gamma), torch.exp(-gamma)
    square = float(x.square().mean())
    errors = noise**2 * square + signal * noise  # of the guess from z_t
    terms = 0.5 * ((snr[:-1] - snr[1:]) * errors[1:]).sum()
    top = 0.5 * (signal[-1] * square + noise[-1] - 1 - noise[-1].log())
    seen = -0.5 * (math.log(2 * math.pi) + gamma[0] + 1)
    exact = 2 * float(seen - top - terms)
    evidence = float(torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1).mean())
    assert evidence - 1.0 < exact < evidence
    bound, se = model.bound(x, num_samples=400, seed=0)
    assert abs(bound - exact) < 4 * se < 0.2
    whole, se = unrolled(model, x, EXACT, 80)
    assert abs(whole - exact) < 4 * se < 0.25


def test_the_bound_is_below_the_evidence() -> None:
    """The evidences of all eight data sum to 1, and importance sampling finds them."""
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    model = made(x, steps=3, schedule=NoiseSchedule(-0.5, 1.5))
    found = model.score_samples(x, num_samples=4000, seed=0)
    total = float(found.log_evidence.exp().sum())
    se = float((found.se * found.log_evidence.exp()).square().sum().sqrt())
    assert abs(total - 1) < 4 * se < 0.2
    with torch.no_grad():
        bound, se = model.bound(x, num_samples=200, seed=0)
    assert bound + 4 * se < float(found.log_evidence.mean())


def test_training_finds_a_noise_schedule_and_the_data() -> None:
    torch.manual_seed(0)
    which = torch.rand(400) < 0.75
    x = torch.where(
        which[:, None], torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0, 1, 1])
    )
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    network = DenoisingMLP(4, 64, 2)
    model = DiffusionVAE(4, 20, network=network).fit(x, steps=800, lr=5e-3, seed=0)
    bound, _ = model.bound(x, num_samples=20, seed=0)
    assert -bound < entropy + 0.35  # 20 steps cost something; independent bits have 2.2
    drawn = model.sample(1000, seed=0)
    first = (drawn == torch.tensor([1.0, 1, 0, 0])).all(1).float().mean()
    second = (drawn == torch.tensor([0.0, 0, 1, 1])).all(1).float().mean()
    assert float(first + second) > 0.9
    assert float(first) == pytest.approx(0.75, abs=0.1)
    gamma = model.schedule(torch.linspace(0, 1, 50))
    assert bool((gamma.diff() > 0).all())
    assert not torch.allclose(gamma[[0, -1]], torch.tensor([-6.0, 6.0]), atol=0.1)


@pytest.mark.parametrize("latent_scale", [pytest.param(1.0, marks=pytest.mark.slow), 1.7])
def test_latent_diffusion(latent_scale: float) -> None:
    """Its ELBO is that of all latents as sites; the autoencoder stays as it was."""
    x = bits(12, 4)
    torch.manual_seed(0)
    vae = VAE(4, 2, hidden=(8,))
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model = made(x, autoencoder=vae, steps=4, latent_scale=latent_scale)
    with torch.no_grad():
        estimate = model.bound(x, num_samples=250, seed=0)
        same(estimate, unrolled(model, x, TRACE, 100))
        same(estimate, unrolled(model, x, EXACT, 100))
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    model.fit(x, steps=30, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    assert not torch.equal(model.schedule.low, torch.tensor(-6.0))
    assert torch.equal(model.encode(x), vae.encode(x))
    assert model.sample(3, seed=0).shape == (3, 4)
    assert model.score_samples(x, num_samples=50, seed=0).log_evidence.shape == (12,)


def test_minibatches_estimate_the_whole() -> None:
    x = bits(8, 2)
    model = made(x, steps=2)
    with torch.no_grad():
        whole = model.bound(x, num_samples=400, seed=0)
        halves = [model.bound(part, num_samples=200, seed=s) for s, part in enumerate(x.split(4))]
    mean, se = (sum(h[0] for h in halves) / 2, math.hypot(*(h[1] for h in halves)) / 2)
    same(whole, (mean, se))


def test_images_and_levels() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 16, (6, 1, 5, 6)).float()
    network = UNet((1, 5, 6), (4, 8))
    model = DiffusionVAE((1, 5, 6), 3, network=network, likelihood=DiscretizedLogistic(16))
    model.fit(x, steps=5, seed=0)
    assert model.sample(2, seed=0).shape == (2, 1, 5, 6)
    assert model.encode(x).shape == (6, 30)
    # nothing but noise of sd e^-3 on [-1, 1] is between a datum and z_0
    assert float((model.reconstruct(x) - x).abs().max()) < 0.5
    folded = KLAutoencoder((1, 8, 8), 2, channels=(4, 4))
    latent = DiffusionVAE((1, 8, 8), 3, autoencoder=folded, network=UNet((2, 2, 2), (4,)))
    latent.fit(torch.rand(5, 1, 8, 8), steps=3, seed=0)
    assert latent.sample(2, seed=0, mean=True).shape == (2, 1, 8, 8)


def test_networks_treat_rows_alone() -> None:
    torch.manual_seed(0)
    for network in (DenoisingMLP((2, 4, 4)), UNet((2, 4, 4), (4, 8))):
        for p in network.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        z, level = torch.randn(3, 5, 2, 4, 4), torch.rand(3, 5)
        whole = network(z, level)
        torch.testing.assert_close(network(z[1, 2], level[1, 2]), whole[1, 2], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(network(z, 1 - level), whole)


def test_save_and_load(tmp_path: Path) -> None:
    x = bits()
    model = made(x, steps=3, schedule=NoiseSchedule(-4.0, 4.0)).fit(x, steps=5, seed=0)
    model.save(tmp_path / "model")
    again = DiffusionVAE.load(tmp_path / "model")
    assert again.bound(x, num_samples=3, seed=0) == model.bound(x, num_samples=3, seed=0)
    own = DiffusionVAE(3, 2, network=_Own())
    own.save(tmp_path / "own")
    with pytest.raises(CheckpointError, match="network"):
        DiffusionVAE.load(tmp_path / "own")


class _Own(nn.Module):
    def forward(self, z: Tensor, level: Tensor) -> Tensor:
        return z


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiffusionVAE(3, 0), "steps"),
        (lambda: DiffusionVAE(3, likelihood=Categorical(4)), "decoder="),
        (lambda: DiffusionVAE(3, autoencoder=VAE(4, 2)), "shape"),
        (lambda: DiffusionVAE(4, autoencoder=VAE(4, 2), likelihood=Gaussian()), "leave them out"),
        (lambda: NoiseSchedule(3.0, 2.0), "end"),
        (lambda: DiffusionVAE(3).bound(bits(), num_samples=1), "num_samples"),
        (lambda: UNet((1, 4, 4), ()), "channels"),
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()  # type: ignore[operator]


def test_data_outside_of_the_support_are_refused() -> None:
    with pytest.raises(DataError, match="Bernoulli"):
        DiffusionVAE(3, 2).fit(torch.full((4, 3), 0.5), steps=2)


def test_compiled_fit_is_the_same() -> None:
    x = bits(64, 3)
    one, two = (made(x, steps=4) for _ in range(2))
    one.fit(x, steps=80, seed=0, compile=False)
    two.fit(x, steps=80, seed=0, compile="graph")
    assert two.result().notes[0].startswith("compiled")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
