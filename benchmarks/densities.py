"""How probable are test digits under latents, codes, autoregression and flows, in one unit?

All are models of the whole numbers 0 to 16 of scikit-learn's 8 x 8 digits, so their log
probabilities can be compared: exact where they are, else by importance samples or bounded. Reduced:
1,500 images to train on, 40 epochs, one size of networks.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from pvi.models.vae import (
    VAE,
    VQVAE,
    AutoregressiveLikelihood,
    AutoregressiveModel,
    DiscretizedLogistic,
    FlowModel,
)
from pvi.nn import MADE, ConvDecoder, ConvEncoder, PixelCNN

SHAPE, LEVELS, EPOCHS, CHANNELS = (1, 8, 8), 17, 40, (16, 32)
HEADER = ("model", "train", "test", "how", "KL", "seconds", "seconds to draw 100")
MEANING = {
    "train, test": "minus log probability of an image, nats; of the first 100 where sampled",
    "how": "exact; IS, by 300 importance samples; bound: the true one is lower",
    "KL": "of the latents, nats an image (of codes with the learned prior: -log p of the codes)",
}


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1)
    return images[:1500], images[1500:]


def levels(components: int = 1) -> DiscretizedLogistic:
    return DiscretizedLogistic(LEVELS, components)


def vae(likelihood: Any) -> VAE:
    encoder = ConvEncoder(SHAPE, 32, CHANNELS)
    out = (likelihood.width, *SHAPE[1:])
    decoder = ConvDecoder(16, out, CHANNELS)
    return VAE(SHAPE, 16, encoder=encoder, decoder=decoder, likelihood=likelihood)


def decoded(channels: int, layers: int) -> VAE:
    network = PixelCNN(SHAPE, 2, channels, layers, context=4)
    return vae(AutoregressiveLikelihood(SHAPE, levels(), network, context=4))


def models() -> dict[str, Any]:
    pixels = {"likelihood": levels(3), "network": PixelCNN(SHAPE, 9, 32, 4)}
    masked = {"likelihood": levels(3), "network": MADE(SHAPE, 9, (256, 256))}
    options = {"transforms": 3, "hidden_features": (128, 128)}
    return {
        "VAE": lambda: vae(levels()),
        "VAE, PixelCNN of 1 layer": lambda: decoded(8, 1),
        "VAE, PixelCNN of 5 layers": lambda: decoded(32, 5),
        "VQ-VAE": lambda: VQVAE(SHAPE, 32, 8, channels=(32,), likelihood=levels()),
        "PixelCNN": lambda: AutoregressiveModel(SHAPE, **pixels),
        "MADE": lambda: AutoregressiveModel(SHAPE, **masked),
        "flow (MAF)": lambda: FlowModel(SHAPE, options=options, levels=LEVELS),
    }


def rows(name: str, seed: int) -> list[list[Any]]:
    train, test = digits()
    torch.manual_seed(seed)
    model, begun = models()[name](), time.perf_counter()
    model.fit(train, epochs=EPOCHS, batch_size=50, seed=seed, lr=2e-3)
    seconds = time.perf_counter() - begun
    fit = model.fit_
    for note in fit.notes:
        print(f"{name}: {note}")
    if not isinstance(model, VQVAE):
        exact = isinstance(model, AutoregressiveModel)
        count = len(test) if exact else 100
        scores = [
            -model.score_samples(x[:count], num_samples=300, seed=0).log_evidence.mean()
            for x in (train, test)
        ]
        kl = "-"
        if isinstance(model, VAE):
            kl = round(float(fit.history["kl/z"][-30:].mean()) / len(train), 1)
        return [line(name, scores, "exact" if exact else "IS", kl, seconds, model)]
    found = [line(name, bounds(model, train, test), "bound", information(model), seconds, model)]
    model.fit_prior(train, epochs=EPOCHS, batch_size=50, seed=seed, lr=2e-3)
    seconds = time.perf_counter() - begun
    kl = information(model)
    return [
        *found,
        line(f"{name}, learned prior", bounds(model, train, test), "bound", kl, seconds, model),
    ]


def line(name: str, scores: list, how: str, kl: Any, seconds: float, model: Any) -> list[Any]:
    begun = time.perf_counter()
    model.sample(100, seed=0)
    drawn = time.perf_counter() - begun
    numbers = [round(float(score), 1) for score in scores]
    return [name, *numbers, how, kl, round(seconds, 1), round(drawn, 2)]


def bounds(model: VQVAE, *parts: Tensor) -> list[float]:
    return [-pvi.ELBO().bound(model.model, model.guide, x) / len(x) for x in parts]


def information(model: VQVAE) -> float:
    """KL of the test images' codes to the prior, nats an image."""
    test = digits()[1]
    with torch.no_grad():
        terms = pvi.TraceMeanFieldELBO().terms(model.model, model.guide, test)
    return round(float(terms.kl()["z"]) / len(test), 1)


def picture(folder: Path, seed: int) -> None:
    """Draws of the models, for the page of the documentation."""
    train, _ = digits()
    shown = {"data": train[:10, 0]}
    for name in ("VAE", "VQ-VAE", "PixelCNN", "flow (MAF)"):
        torch.manual_seed(seed)
        model = models()[name]().fit(train, epochs=EPOCHS, batch_size=50, seed=seed, lr=2e-3)
        if isinstance(model, VQVAE):
            shown["VQ-VAE, uniform prior"] = model.sample(10, seed=1)[:, 0]
            model.fit_prior(train, epochs=EPOCHS, batch_size=50, seed=seed, lr=2e-3)
            shown["reconstructed"] = model.reconstruct(train[:10])[:, 0]
        label = "VQ-VAE, learned prior" if isinstance(model, VQVAE) else name
        shown[label] = model.sample(10, seed=1)[:, 0].clamp(0, LEVELS - 1)
    pvi.plots.plot_images(shown).savefig(folder / "densities.png", dpi=100, bbox_inches="tight")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--picture", type=Path, help="folder for a picture of draws")
    given = options.parse_args()
    if given.picture is not None:
        return picture(given.picture, given.seed)
    found = [row for name in models() for row in rows(name, given.seed)]
    report("densities", HEADER, found, given.results, more={"meaning": MEANING})


if __name__ == "__main__":
    main()
