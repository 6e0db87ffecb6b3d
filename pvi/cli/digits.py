"""The demonstration's VAE: an amortised posterior over a few numbers per image."""

from collections import Counter
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from pvi.cli.output import heading, indented, paragraph, save_draws
from pvi.datasets import digits
from pvi.page import Items, Picture, Section
from pvi.plots import plot_images

LATENT, HIDDEN, PIXELS, MAX_COUNT = 8, 256, 64, 16
TRAINING, BATCH = 1500, 100  # images; those that are not for training are held out
KEPT, COLUMNS = 20, 10  # held-out images whose posterior is kept, and drawn
ABOUT = (
    f"A variational autoencoder with {LATENT} latent numbers for each image of 8 x 8 pixels, whose "
    f"values are counts from 0 to {MAX_COUNT}; two networks with {HIDDEN} hidden units, trained on "
    f"{TRAINING:,} images in minibatches of {BATCH}."
)


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


def run(out: Path, *, seed: int = 0, quick: bool = False) -> list[Section]:
    """Fit on minibatches, check, evaluate on held-out images, and draw."""
    heading("2. A small VAE: handwritten digits")
    print(f"{paragraph(ABOUT)}\n", flush=True)
    counts = torch.as_tensor(digits(), dtype=torch.get_default_dtype())
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    train, test = counts[order[:TRAINING]], counts[order[TRAINING:]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE()
    epochs = 3 if quick else 200
    fit = pvi.fit(vae.model, vae.guide, train, batch_size=BATCH, epochs=epochs, seed=seed)
    print(fit)
    kept = pvi.Posterior(vae.model, vae.guide, test[:KEPT])
    save_draws(kept.to_arviz(20 if quick else 100, seed=seed), out / "vae-posterior.nc")

    held_out = pvi.Posterior(vae.model, vae.guide, test)
    diagnosis = pvi.diagnose(held_out, 200 if quick else 2_000, seed=seed)
    notes = [
        _bounds(vae, test, seed, 2 if quick else 20),
        _one_by_one(vae, test[:KEPT], 500 if quick else 20_000, seed),
    ]
    reasons = "\n".join(f"- {reason}" for reason in diagnosis.reasons)
    print(f"All {len(test)} held-out images at once: {diagnosis.verdict}\n{indented(reasons)}")
    print("\n".join(map(paragraph, notes)), flush=True)
    images = plot_images(_pictures(vae, kept, test[:COLUMNS], seed), COLUMNS)
    caption = "Held-out images, their reconstructions, and new images: decoded draws from the prior"
    pictures = [Picture.of(images, "vae-images.png", caption)]
    caption = f"Bound of all {TRAINING:,} images during training, nats"
    pictures.append(Picture.of(fit.plot(), "vae-bound.png", caption))
    for picture in pictures:
        picture.save(out)
    judged = f"Diagnosis of all {len(test)} held-out images at once:"
    parts = [ABOUT, *notes, judged, Items(diagnosis.reasons), *pictures]
    return [Section("VAE, digits", parts, diagnosis.verdict)]


def _bounds(vae: VAE, x: Tensor, seed: int, repeats: int) -> str:
    """ELBO and IWAE bound of held-out images, in words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        elbo, iwae = (
            sum(objective.bound(vae.model, vae.guide, x) for _ in range(count)) / count / len(x)
            for objective, count in (
                (pvi.ELBO(10), repeats),
                (pvi.IWAE(100), repeats // 2),
            )
        )
    return (
        f"Held-out images, bound for each: ELBO {elbo:.2f} nats, IWAE with 100 draws {iwae:.2f} "
        "nats. The ELBO is at least the difference below the log evidence."
    )


def _one_by_one(vae: VAE, x: Tensor, num_draws: int, seed: int) -> str:
    """Verdicts on the posteriors of single images, in words."""
    posteriors = (pvi.Posterior(vae.model, vae.guide, x[i : i + 1]) for i in range(len(x)))
    verdicts = Counter(pvi.diagnose(p, num_draws, seed=seed).verdict for p in posteriors)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return (
        f"Diagnosis of the first {len(x)} held-out images one by one: {counts}. It judges the "
        "encoder's posterior of the latent numbers, not the pictures that the decoder makes."
    )


def _pictures(vae: VAE, posterior: pvi.Posterior, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Images, the mean of their posterior predictive, and decoded draws from the prior."""
    rebuilt = posterior.predict(num_draws=200, seed=seed)["x"].mean(0)[: len(x)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = torch.randn(2, len(x), LATENT, generator=generator)
        new = vae.decoder(z).sigmoid() * MAX_COUNT
    rows = {"held out": x, "reconstructed": rebuilt, "new": new[0], "new ": new[1]}
    return {name: row.reshape(-1, 8, 8) for name, row in rows.items()}
