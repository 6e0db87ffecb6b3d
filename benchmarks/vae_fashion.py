"""The Fashion-MNIST protocol of Norouzi, Fleet, Norouzi (2020), Exemplar VAEs: for a GPU.

Gated layers 300-300, 40 latents (two layers of 40 for the ladder), log variance from -6 to 2; Adam
at 5e-4 on gradients of unit norm for each tensor, batches of 100; beta from 0 to 1 over 100 epochs,
at most 2,000 epochs, ended by 50 without a better validation bound. The first 50,000 images,
binarised at each draw, are trained on; the last 10,000 validate; these and the test images are
binarised once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from benchmarks.common import report, timed
from benchmarks.vae_orderings import mean_se
from pvi.datasets import Binarized, images
from pvi.models.vae import VAE, LadderVAE, Vamp
from pvi.models.vae.posteriors import AmortizedPosterior
from pvi.nn import GatedMLP

SIZE, LATENTS, HIDDEN, BATCH, RATE = 784, 40, (300, 300), 100, 5e-4
WARM_UP, EPOCHS, PATIENCE, PSEUDO_INPUTS, SAMPLES = 100, 2000, 50, 500, 5000
TARGETS = {"Gaussian": 228.70, "Vamp": 227.35, "ladder": 227.37}
TEST_MEAN = 0.286816
HEADER = ("model", "NLL", "se", "published", "ELBO", "epochs", "images", "seconds")
MEANING = {
    "NLL": f"minus log evidence of test images, {SAMPLES:,} samples, nats (fewer in a smoke run)",
    "published": "Exemplar VAE paper, NLL by 5,000 samples; ladder: two layers",
    "epochs": f"up to {EPOCHS:,}; with few, a smoke run that says nothing of the targets",
}


class Clipped(AmortizedPosterior):
    """N(m, exp(v)) with v held from -6 to 2.

    Args:
        latents: d.
    """

    def __init__(self, latents: int):
        super().__init__()
        self.latents, self.width = latents, 2 * latents

    def forward(self, h: Tensor) -> Any:
        loc, log_variance = h.chunk(2, -1)
        return dist.Normal(loc, (0.5 * log_variance.clamp(-6.0, 2.0)).exp()).to_event(1)


class UnitAdam(torch.optim.Adam):
    """Adam on gradients that are divided by their norm, each tensor's by its own."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(p.grad.norm() + 1e-7)
        return super().step(closure)


def models(train: Tensor) -> dict[str, Callable[[], Any]]:
    """Each model made anew; pseudo-inputs start near the mean image."""
    mean, sd = float(train.mean()), 0.05

    def vae(prior: nn.Module | None = None) -> VAE:
        networks = {
            "encoder": GatedMLP(SIZE, 2 * LATENTS, HIDDEN),
            "decoder": GatedMLP(LATENTS, SIZE, HIDDEN),
        }
        return VAE(SIZE, LATENTS, prior=prior, posterior=Clipped(LATENTS), **networks)

    def ladder() -> LadderVAE:
        width = HIDDEN[0]
        return LadderVAE(
            SIZE,
            (LATENTS, LATENTS),
            encoders=[GatedMLP(SIZE, width, HIDDEN), GatedMLP(width, width, HIDDEN)],
            priors=[GatedMLP(LATENTS, 2 * LATENTS, HIDDEN)],
            decoder=GatedMLP(LATENTS, SIZE, HIDDEN),
            features=width,
        )

    def vamp() -> VAE:
        return vae(Vamp(SIZE, PSEUDO_INPUTS, mean=mean, sd=sd))

    return {"Gaussian": vae, "Vamp": vamp, "ladder": ladder}


def fashion(
    data: Path, results: Path, *, seed: int, device: str, fashion_data: str, smoke: bool, **_: Any
) -> None:
    train, held, test = parts(fashion_data)
    if smoke:
        train, held, test = train[:500], held[:100], test[:20]
    rows = []
    for name, make in models(train).items():
        torch.manual_seed(seed)
        model = make().to(device)
        warm, epochs = (1, 2) if smoke else (WARM_UP, EPOCHS)
        with timed() as seconds:
            done = trained(model, train, held, warm, epochs, device, seed)
        rows.append([name, *scored(model, test, device, 50 if smoke else SAMPLES)])
        rows[-1][3:3] = [TARGETS[name]]
        rows[-1] += [done, len(test), *seconds]
        print(*rows[-1], flush=True)
    key = "fashion_smoke" if smoke else "fashion"
    report("vae", HEADER, rows, results, key=key, more={"fashion_meaning": MEANING})


def parts(source: str) -> tuple[Tensor, Tensor, Tensor]:
    """Fractions to train on, and bits to validate and test on."""
    found = images(source)
    train, test = found.train.flatten(1), found.test.flatten(1)
    random = np.random.RandomState(777)
    held, bits = (
        torch.from_numpy(random.binomial(1, x.double().numpy()).astype(np.float32))
        for x in (train[-10_000:], test)
    )
    if abs(float(bits.mean()) - TEST_MEAN) > 1e-6:
        print(f"test mean {float(bits.mean()):.6f}: not the data of the paper ({TEST_MEAN})")
    return train[:-10_000], held, bits


def trained(
    model: Any, train: Tensor, held: Tensor, warm: int, epochs: int, device: str, seed: int
) -> int:
    """Warm up, then train to the best validation bound; how many epochs it took."""
    options: dict[str, Any] = {"batch_size": BATCH, "optimizer": unit_adam, "device": device}
    rising = pvi.BetaELBO(pvi.schedules.linear(warm, unit="epoch"), kl="exact")
    model.fit(Binarized(train), objective=rising, epochs=warm, seed=seed, **options)
    steps = max(len(train) // BATCH, 1)
    options |= {"validation_data": held, "validate_every": steps, "patience": PATIENCE}
    goal = pvi.TraceMeanFieldELBO()
    model.fit(Binarized(train), objective=goal, epochs=epochs - warm, seed=seed + 1, **options)
    return warm + len(model.fit_.history["bound"]) // steps


def unit_adam(parameters: Any) -> torch.optim.Optimizer:
    return UnitAdam(parameters, lr=RATE)


def scored(model: Any, test: Tensor, device: str, samples: int) -> list[float]:
    """NLL, its standard error over images, and the ELBO, nats an image."""
    test = test.to(device)
    some = [
        model.score_samples(part, num_samples=samples, seed=i).log_evidence.cpu()
        for i, part in enumerate(test.split(1000))
    ]
    with torch.no_grad():
        bound = pvi.TraceMeanFieldELBO(20).bound(model.model, model.guide, test) / len(test)
    return [*mean_se(-torch.cat(some)), bound]
