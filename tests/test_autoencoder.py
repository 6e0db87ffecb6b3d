"""Convolutional networks, and the models with an adversary: their losses by hand."""

import math
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pvi.errors import DataError, FitError, ModelError
from pvi.models.vae import (
    GAN,
    VAE,
    FactorVAE,
    FullCovariance,
    Gaussian,
    KLAutoencoder,
    Laplace,
)
from pvi.nn import MLP, ConvDecoder, ConvEncoder, PatchDiscriminator
from pvi.nn.conv import sizes
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
IMAGES = [(1, 8, 8), (3, 7, 5), (2, 1, 9)]


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("levels", [1, 3])
def test_convolutional_shapes(image: tuple[int, ...], levels: int, blocks: int) -> None:
    """Of any size, with any dimensions before, rows apart; latents as vectors or as maps."""
    channels, (h, w) = (4, 6, 5)[:levels], sizes(image, levels)[-1]
    x = randn(2, 3, *image).double()
    for latents, n in ((7, 7), ((2, h, w), 2 * h * w)):
        encoder = ConvEncoder(image, latents, channels, blocks)
        decoder = ConvDecoder(latents, image, channels, blocks)
        z = encoder(x)
        assert z.shape == (2, 3, n) and decoder(z).shape == x.shape
        assert torch.allclose(encoder(x[1, 2]), z[1, 2], atol=EXACT)
        assert torch.allclose(decoder(z[1, 2]), decoder(z)[1, 2], atol=EXACT)
    network = PatchDiscriminator(image, channels)
    assert network(x).shape == (2, 3, h * w)
    assert torch.allclose(network(x[1, 2]), network(x)[1, 2], atol=EXACT)


def test_maps_keep_their_place() -> None:
    """A change in one corner of the image changes only the latents there."""
    encoder = ConvEncoder((1, 32, 32), (1, 16, 16), (4,))
    for norm in (m for m in encoder.modules() if isinstance(m, nn.GroupNorm)):
        norm.forward = lambda x: x  # which looks at the whole image
    x = randn(1, 32, 32).double()
    other = x.clone()
    other[:, :4, :4] += 1.0
    moved = (encoder(x) != encoder(other)).reshape(16, 16)
    assert moved[:2, :2].all() and not moved[8:].any() and not moved[:, 8:].any()


def test_networks_refuse() -> None:
    with pytest.raises(ModelError, match=r"\(channels, 4, 4\)"):
        ConvEncoder((1, 8, 8), (2, 8, 8), (4,))
    with pytest.raises(ModelError, match=r"images \(C, H, W\)"):
        ConvDecoder(3, (8, 8))
    with pytest.raises(ModelError, match=r"\(1, 8, 8\) got a tensor of shape \(2, 8, 8\)"):
        PatchDiscriminator((1, 8, 8))(torch.zeros(2, 8, 8))
    with pytest.raises(ModelError, match="3 numbers"):
        ConvDecoder(3, (1, 8, 8))(torch.zeros(2, 4))


def autoencoder(**options: object) -> tuple[KLAutoencoder, Tensor]:
    torch.manual_seed(0)
    model = KLAutoencoder((1, 6, 6), 2, channels=(4,), **options)  # type: ignore[arg-type]
    return model, randn(12, 1, 6, 6, seed=2).double()


def test_the_loss_of_the_autoencoder_by_hand() -> None:
    """One step over all rows: Laplace, 1e-6 KL, features, and the discriminator's share."""
    torch.manual_seed(4)
    features = nn.Conv2d(1, 3, 3)
    model, x = autoencoder(features=features, feature_weight=0.3)
    same, _ = autoencoder(features=features, feature_weight=0.3)
    fit = model.fit(x, batch_size=12, steps=1, lr=1e-9, seed=0).result()
    q = same.encoded(x)
    found = {name: float(fit.history[name][0]) for name in fit.history}
    kl = kl_divergence(q, dist.Normal(torch.zeros(18), 1.0).to_event(1)).sum()
    assert found["kl/z"] == pytest.approx(kl.item(), rel=1e-6)
    weight, term = (found[f"adversary/patches/{name}"] for name in ("weight", "term"))
    features_part = found["penalty"] - 0.5 * 12 * term  # which has the fixed weight
    loss = -found["log_likelihood"] + 1e-6 * found["kl/z"] + features_part + weight * 12 * term
    assert found["loss"] == pytest.approx(loss, rel=1e-9)
    assert found["bound"] == pytest.approx(found["log_likelihood"] - found["kl/z"], rel=1e-9)
    shown = same.decode(q.mean)
    expected = 36 * (features(x) - features(shown)).square().flatten(1).mean(1)
    assert torch.allclose(same.distance(x, shown), expected)
    drawn = same.distance(x, shown.expand(2, *shown.shape))
    assert torch.allclose(drawn, expected.expand(2, 12)) and features_part > 0


def test_features_are_not_trained_and_the_objective_says_beta() -> None:
    features = nn.Conv2d(1, 3, 3)
    before = features.weight.detach().clone()
    model, x = autoencoder(features=features)
    model.fit(x, batch_size=6, steps=3, seed=0)
    assert torch.equal(features.weight, before)
    assert model.objective().beta == 1e-6
    assert model.latent_shape == (2, 3, 3) and model.encode(x).shape == (12, 18)
    assert isinstance(model.likelihood, Laplace)
    ids = {id(p) for p in model.parameters()}
    assert not ids & {id(p) for p in model.discriminator.parameters()}


def test_the_summary_tells_the_bound_apart() -> None:
    model, x = autoencoder()
    with pytest.raises(FitError, match="call fit first"):
        model.summary()
    fit = model.fit(x, batch_size=6, steps=4, seed=0).result()
    text = model.summary()
    assert text.startswith("KLAutoencoder: the objective is not a bound")
    bound = fit.history["bound"].mean() / 12
    assert f"ELBO at beta = 1 {bound:.4g} nats a datum" in text
    assert any("not a bound" in caveat for caveat in fit.posterior.caveats())
    assert any("tempered" in caveat for caveat in fit.posterior.caveats())


def test_scores_are_those_of_the_model_as_it_is() -> None:
    """The same importance weights as those of a plain VAE with the same parts."""
    model, x = autoencoder()
    model.fit(x, batch_size=6, steps=2, seed=0)
    parts = {"encoder": model.encoder, "decoder": model.decoder, "likelihood": model.likelihood}
    plain = VAE((1, 6, 6), 18, **parts)  # type: ignore[arg-type]
    found = [m.score_samples(x[:4], num_samples=50, seed=1).log_evidence for m in (model, plain)]
    assert np.array_equal(*map(np.asarray, found))


def test_other_posteriors_and_likelihoods() -> None:
    """A full covariance, whose numbers make no maps, and a likelihood of two numbers each."""
    model, x = autoencoder(posterior=FullCovariance(18))
    model.fit(x, batch_size=6, steps=2, seed=0)
    assert model.encode(x).shape == (12, 18)
    torch.manual_seed(0)
    other = KLAutoencoder((1, 6, 6), 2, channels=(4,), likelihood=Gaussian("decoded"))
    other.fit(x, batch_size=6, steps=2, seed=0)
    assert other.reconstruct(x).shape == x.shape


def test_delayed_by_epochs() -> None:
    model, x = autoencoder(adversary_start=2)
    weights = model.fit(x, batch_size=6, epochs=3, seed=0).result().history
    assert (weights["adversary/patches/weight"] > 0).tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("kind", ["KLAutoencoder", "FactorVAE", "GAN"])
def test_saved_without_code(kind: str, tmp_path: Path) -> None:
    """The model comes back with its parameters; the adversary's are not kept."""
    x = randn(8, 1, 6, 6).double()
    models = {
        "KLAutoencoder": lambda: autoencoder()[0],
        "FactorVAE": lambda: FactorVAE((1, 6, 6), 2, likelihood=Gaussian(), hidden=(4,)),
        "GAN": lambda: GAN((1, 6, 6), 2, hidden=(4,)),
    }
    model = models[kind]().fit(x, batch_size=4, steps=2, seed=0)
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model")
    z = randn(3, model.latents).double()
    assert torch.equal(again.decode(z), model.decode(z))
    again.fit(x, batch_size=4, steps=1, seed=0)


def correlation(model: VAE, x: Tensor) -> float:
    """Total correlation of a normal with the moments of q(z), nats."""
    q = model.encoded(x)
    with torch.no_grad():
        covariance = torch.cov(q.mean.T) + q.variance.mean(0).diag()
    return 0.5 * float(covariance.diagonal().log().sum() - torch.logdet(covariance))


def test_factor_vae_lowers_the_total_correlation() -> None:
    """Latents that are the data, correlated, but for what the penalty moves them away."""
    noise = randn(256, 2, seed=3).double()
    x = torch.stack([noise[:, 0], 0.8 * noise[:, 0] + 0.6 * noise[:, 1]], -1)
    found = []
    for gamma in (0.0, 5.0):
        torch.manual_seed(5)
        networks = {"encoder": nn.Linear(2, 4), "decoder": nn.Identity()}
        own = {"discriminator": MLP(2, 1, (32,)), "lr": 0.02}
        model = FactorVAE(2, 2, gamma=gamma, likelihood=Gaussian(0.5), **own, **networks)
        fit = model.fit(x, steps=150, lr=0.05, seed=0, batch_size=256).result()
        found.append(correlation(model, x))
        told = fit.history["adversary/total_correlation/term"][-10:].mean()
        assert abs(told - found[-1]) < 0.02, (told, found)  # three seeds: at most 0.006
    assert found[0] > 0.2 and found[1] < 0.3 * found[0], found


def test_gan_moves_to_the_data() -> None:
    torch.manual_seed(0)
    x = 3.0 + 0.5 * randn(256, 1, seed=1).double()
    model = GAN(1, 1, generator=nn.Linear(1, 1), hidden=(16,), lr=0.03)
    start = model.sample(500, seed=2)
    fit = model.fit(x, batch_size=256, steps=250, lr=0.03, seed=0).result()
    drawn = model.sample(500, seed=2)
    assert abs(float(drawn.mean()) - 3.0) < 0.2 < abs(float(start.mean()) - 3.0)
    assert (fit.history["bound"] == 0).all()
    term = fit.history["adversary/discriminator/term"]
    assert np.allclose(fit.history["loss"], 256 * term)
    assert math.isfinite(term[-1]) and "no likelihood" in model.summary()


def test_gan_refuses_what_it_has_not() -> None:
    model, x = GAN((2, 3), 2, hidden=(4,)), torch.zeros(4, 2, 3)
    for method in (model.score_samples, model.score, model.encode, model.reconstruct):
        with pytest.raises(ModelError, match="no likelihood"):
            method(x)
    with pytest.raises(DataError, match="finite"):
        model.fit(x / 0.0, steps=1)
    assert model.decode(torch.zeros(5, 2)).shape == (5, 2, 3)
