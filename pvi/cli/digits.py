"""The demonstration's VAE: an amortised posterior over a few numbers per image."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from pvi.cli.output import heading, write
from pvi.datasets import digits
from pvi.plots import plot_images
from pvi.report import Section

LATENT, HIDDEN, PIXELS, MAX_COUNT = 8, 256, 64, 16
TRAINING = 1500  # images; the rest are held out


class VAE(nn.Module):
    """z ~ N(0, I), each pixel a count from a binomial whose logit a network decodes from z."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _mlp(PIXELS, 2 * LATENT)
        self.decoder = _mlp(LATENT, PIXELS)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pixels = dist.Binomial(MAX_COUNT, logits=self.decoder(z))
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("image", len(x)):
            loc, log_scale = self.encoder(x / MAX_COUNT).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def _mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs))


def run(out: Path, *, seed: int = 0, quick: bool = False) -> Section:
    """Fit on minibatches, check, evaluate on held-out images, and draw."""
    heading("A small VAE: 1,797 handwritten digits of 8 x 8 pixels")
    images = torch.as_tensor(digits(), dtype=torch.get_default_dtype())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = images[order[:TRAINING]], images[order[TRAINING:]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE()
    epochs = 3 if quick else 200
    fit = pvi.fit(vae.model, vae.guide, data=train, batch_size=100, epochs=epochs, seed=seed)
    held_out = pvi.Posterior(vae.model, vae.guide, test)
    diagnosis = pvi.diagnose(held_out, 200 if quick else 2_000, seed=seed)
    print(f"\nHeld-out images:\n{diagnosis}")
    elbo, iwae = _bounds(vae, test, seed, 20 if quick else 100)
    text = (
        f"{LATENT} latent numbers per image, fitted to {TRAINING} images in minibatches of 100. On "
        f"{len(test)} held-out images, per image: ELBO {elbo:.2f} nats, IWAE with 50 draws "
        f"{iwae:.2f} nats."
    )
    print(f"\n{text}\n")
    shown = pvi.Posterior(vae.model, vae.guide, test[:10])
    idata = shown.to_arviz(200, seed=seed)
    section = write(
        fit, diagnosis, idata, out, title="VAE, digits", text=text, prefix="vae-", var_names=["z"]
    )
    picture = out / "vae-images.png"
    plot_images(_pictures(vae, shown, test[:10], seed)).savefig(picture, dpi=120)
    figures = (*section.figures, ("Held-out images, their reconstructions, and samples", picture))
    return Section(section.title, text, section.verdict, section.blocks, figures)


def _bounds(vae: VAE, x: Tensor, seed: int, repeats: int) -> tuple[float, float]:
    """ELBO and IWAE bound per image on held-out images, nats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = [
            sum(objective.bound(vae.model, vae.guide, x) for _ in range(count)) / count / len(x)
            for objective, count in ((pvi.ELBO(), repeats), (pvi.IWAE(50), max(repeats // 20, 1)))
        ]
    return values[0], values[1]


def _pictures(vae: VAE, posterior: pvi.Posterior, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Images, the mean of their posterior predictive, and decoded draws from the prior."""
    rebuilt = posterior.predict(num_draws=200, seed=seed)["x"].mean(0)[: len(x)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = torch.randn(len(x), LATENT, generator=generator)
        samples = vae.decoder(z).sigmoid() * MAX_COUNT
    rows = {"held-out": x, "reconstruction": rebuilt, "sample": samples}
    return {name: row.reshape(-1, 8, 8) for name, row in rows.items()}
