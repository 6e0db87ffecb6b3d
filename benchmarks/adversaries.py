"""What an autoencoder for latent diffusion gives up for sharper reconstructions, on small digits.

The same networks as a VAE, with KL times 1e-6, and with a patch discriminator besides; and a GAN.
Reduced: 8 x 8 images of scikit-learn, 1,500 to train on, 60 epochs.
"""

import time
from typing import Any

import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from pvi.models.vae import GAN, VAE, KLAutoencoder, Laplace
from pvi.nn import ConvDecoder, ConvEncoder, PatchDiscriminator

SHAPE, MAP, CHANNELS, EPOCHS = (1, 8, 8), (4, 2, 2), (16, 32), 60
HEADER = ("model", "error", "ELBO", "NLL", "distance", "seconds")
MEANING = {
    "error": "mean absolute error of reconstructed test images, grey values from 0 to 1",
    "ELBO": "at beta = 1, test data, nats a datum",
    "NLL": "of 100 test images by 1,000 importance samples each, nats a datum",
    "distance": "of 300 draws from the prior to the nearest training image, Euclidean",
}


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images / 16, dtype=torch.float32).unsqueeze(1)
    return images[:1500], images[1500:]


def models() -> dict[str, Any]:
    def vae() -> VAE:
        encoder = ConvEncoder(SHAPE, (2 * MAP[0], *MAP[1:]), CHANNELS, 1)
        decoder = ConvDecoder(MAP, SHAPE, CHANNELS, 1)
        return VAE(SHAPE, 16, encoder=encoder, decoder=decoder, likelihood=Laplace())

    def autoencoder(**options: Any) -> KLAutoencoder:
        return KLAutoencoder(SHAPE, MAP[0], channels=CHANNELS, **options)

    def gan() -> GAN:
        generator = ConvDecoder(16, SHAPE, CHANNELS, 1)
        return GAN(
            SHAPE, 16, generator=generator, discriminator=PatchDiscriminator(SHAPE, CHANNELS)
        )

    return {
        "VAE": vae,
        "KL 1e-6": lambda: autoencoder(adversary_weight=0.0),
        "KL 1e-6, adversary": autoencoder,
        "the same from epoch 30": lambda: autoencoder(adversary_start=30),
        "GAN": gan,
    }


def row(name: str, seed: int) -> list[Any]:
    train, test = digits()
    torch.manual_seed(seed)
    model, begun = models()[name](), time.perf_counter()
    rate = None if name == "GAN" else 3e-3
    model.fit(train, epochs=EPOCHS, batch_size=64, seed=seed, lr=rate)
    seconds = time.perf_counter() - begun
    draws = model.sample(300, mean=True, seed=0).flatten(1)
    distance = torch.cdist(draws, train.flatten(1)).min(1).values.mean()
    if name == "GAN":
        return [name, "-", "-", "-", round(distance.item(), 2), round(seconds, 1)]
    error = (model.reconstruct(test) - test).abs().mean()
    evidence = model.score_samples(test[:100], num_samples=1000, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bound = pvi.TraceMeanFieldELBO(50).bound(model.model, model.guide, test) / len(test)
    nll = round(-float(evidence.log_evidence.mean()), 1)
    numbers = (round(error.item(), 4), round(bound, 1), nll)
    return [name, *numbers, round(distance.item(), 2), round(seconds, 1)]


def main() -> None:
    options = parser(__doc__).parse_args()
    seeds = range(options.seed, options.seed + 2)
    rows = [row(name, seed) for name in models() for seed in seeds]
    report("adversaries", HEADER, rows, options.results, more={"meaning": MEANING})


if __name__ == "__main__":
    main()
