"""MNIST, one stochastic layer: the ELBO, IWAE with 5 and 50 draws, and its path gradient.

Networks, batches and binarisation are those of the IWAE paper (Burda, Grosse, Salakhutdinov 2016:
tanh, 784-200-200-50, 20 images, binarised at each draw), its 3,280 epochs are not: reduced.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvi
from benchmarks.common import report, timed
from pvi.datasets import Binarized, images
from pvi.models.vae import VAE
from pvi.nn import MLP

LATENTS, HIDDEN, BATCH, RATE = 50, (200, 200), 20, 1e-3
SAMPLES, IMAGES, LOOKED_AT = 5000, 500, 2000
OBJECTIVES = {
    "VAE": pvi.TraceMeanFieldELBO(),
    "IWAE, 5 draws": pvi.IWAE(5),
    "IWAE, 50 draws": pvi.IWAE(50),
    "the same, path gradient": pvi.IWAE(50, gradient="path"),
}
HEADER = ("objective", "NLL", "se", "less than above", "se of that", "ELBO", "active", "seconds")
MEANING = {
    "NLL": f"minus log evidence, {SAMPLES} samples, mean of the first {IMAGES} test images, nats",
    "se": "over images; of the difference: paired, the same images. One seed of training",
    "less than above": "NLL of the row before minus that of this one",
    "ELBO": "at beta = 1 of the same images, nats",
    "active": f"latents whose posterior mean has a variance above 0.01 over {LOOKED_AT} images",
    "epochs": "reduced; Adam, first rate 1e-3, falling along a cosine; equal for all",
}


def network(train: Tensor) -> VAE:
    """The paper's, with the logits of the mean image as the output's first bias."""
    size = train[0].numel()
    encoder = MLP(size, 2 * LATENTS, HIDDEN, "tanh")
    decoder = MLP(LATENTS, size, HIDDEN, "tanh")
    with torch.no_grad():
        decoder.layers[-1].bias.copy_(train.mean(0).clamp(1e-3, 1 - 1e-3).logit())
    return VAE(size, LATENTS, encoder=encoder, decoder=decoder)


def orderings(data: Path, results: Path, *, epochs: int, seed: int, **_: Any) -> None:
    found = images(data / "mnist" / "mnist.npz")
    train = found.train.flatten(1)
    test = Binarized(found.test.flatten(1)).fixed(seed=0)
    rows, before = [], None
    more = {"orderings_epochs": epochs, "orderings_meaning": MEANING}
    for name, objective in OBJECTIVES.items():
        torch.manual_seed(seed)
        model = network(train)
        options: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "lr": RATE, "seed": seed}
        with timed() as seconds:
            model.fit(Binarized(train), objective=objective, **options)
        nll = -model.score_samples(test[:IMAGES], num_samples=SAMPLES, seed=0).log_evidence
        variance = model.encode(test[:LOOKED_AT]).var(0, correction=0)
        less = (math.nan, math.nan) if before is None else mean_se(before - nll)
        active = int((variance > 0.01).sum())
        rows.append([name, *mean_se(nll), *less, elbo(model, test[:IMAGES]), active, *seconds])
        print(*rows[-1], flush=True)
        before = nll
        shown = [[None if x != x else x for x in row] for row in rows]
        report("vae", HEADER, shown, results, key="orderings", more=more)


def elbo(model: VAE, x: Tensor) -> float:
    """The ELBO of a datum, nats, exact KL and 20 draws."""
    with torch.no_grad():
        return pvi.TraceMeanFieldELBO(20).bound(model.model, model.guide, x) / len(x)


def mean_se(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std() / math.sqrt(len(x)))
