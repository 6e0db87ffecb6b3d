"""pythae's VAE and IWAE beside pvi's: the same networks, data, optimiser and epochs.

All are evaluated by pvi: pythae's trained networks become the parts of a `VAE`. Needs pythae 0.1.2
(`pip install pythae==0.1.2 imageio`).
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from benchmarks.common import report, timed
from benchmarks.vae_orderings import mean_se
from pvi.models.vae import VAE
from pvi.models.vae.posteriors import AmortizedPosterior
from pvi.nn import MLP

SIZE, LATENTS, HIDDEN, DRAWS = 784, 20, (400, 400), 5
ROWS, EPOCHS, BATCH, RATE = 10_000, 3, 100, 1e-3
IMAGES, SAMPLES = 200, 500
HEADER = ("model", "package", "NLL", "se", "bound", "training objective", "seconds an epoch")
MEANING = {
    "NLL": f"minus log evidence of {IMAGES} test images, {SAMPLES} samples, by pvi, nats",
    "bound": "ELBO, or IWAE with 5 draws, of the same images by pvi, nats",
    "training objective": "what the package's own loss says of the same images, nats",
    "data": f"statically binarised MNIST, the first {ROWS:,} images, {EPOCHS} epochs: reduced",
}


class LogVariance(AmortizedPosterior):
    """N(m, exp(v)), as pythae has it.

    Args:
        latents: d.
    """

    def __init__(self, latents: int):
        super().__init__()
        self.latents, self.width = latents, 2 * latents

    def forward(self, h: Tensor) -> Any:
        loc, log_variance = h.chunk(2, -1)
        return dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1)


def networks(seed: int) -> tuple[MLP, MLP]:
    torch.manual_seed(seed)
    return MLP(SIZE, 2 * LATENTS, HIDDEN, "relu"), MLP(LATENTS, SIZE, HIDDEN, "relu")


def assembled(encoder: nn.Module, decoder: nn.Module) -> VAE:
    posterior = LogVariance(LATENTS)
    return VAE(SIZE, LATENTS, encoder=encoder, decoder=decoder, posterior=posterior)


def pythae_wrapped(encoder: nn.Module, decoder: nn.Module, draws: int) -> Any:
    """A model of pythae's with these networks."""
    from pythae.models import IWAE, IWAEConfig, VAEConfig
    from pythae.models import VAE as Peer
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    given: dict[str, Any] = {"input_dim": (SIZE,), "latent_dim": LATENTS}
    given["reconstruction_loss"] = "bce"
    if draws == 1:
        return Peer(VAEConfig(**given), Encoder(), Decoder())
    return IWAE(IWAEConfig(**given, number_samples=draws), Encoder(), Decoder())


def by_pythae(train: Tensor, test: Tensor, draws: int, seed: int) -> tuple[VAE, float, float]:
    """The model, minus its own loss on test images (mean of 20), and seconds an epoch."""
    from pythae.data.datasets import BaseDataset, DatasetOutput
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    peer = pythae_wrapped(*networks(seed), draws)
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=EPOCHS,
            learning_rate=RATE,
            per_device_train_batch_size=BATCH,
            seed=seed,
            no_cuda=True,
        )
        rows = BaseDataset(train, torch.zeros(len(train)))
        trainer = BaseTrainer(peer, train_dataset=rows, training_config=config)
        with timed() as seconds:
            trainer.train()
    last = trainer.model.eval()
    with torch.no_grad():
        own = -float(np.mean([float(last(DatasetOutput(data=test)).loss) for _ in range(20)]))
    return assembled(last.encoder.net, last.decoder.net), own, seconds[0] / EPOCHS


def by_pvi(train: Tensor, test: Tensor, draws: int, seed: int) -> tuple[VAE, float, float]:
    model = assembled(*networks(seed))
    goal = objective(draws)
    options: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "seed": seed}
    with timed() as seconds:
        model.fit(train, objective=goal, optimizer=adam, **options)
    return model, bound(model, goal, test), seconds[0] / EPOCHS


def bound(model: VAE, goal: pvi.Objective, test: Tensor) -> float:
    """The mean of 20 estimates, nats a datum."""
    with torch.no_grad():
        found = [goal.bound(model.model, model.guide, test) for _ in range(20)]
    return float(np.mean(found)) / len(test)


def objective(draws: int) -> pvi.Objective:
    return pvi.TraceMeanFieldELBO() if draws == 1 else pvi.IWAE(draws)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=RATE)


def pythae(data: Path, results: Path, *, seed: int, **_: Any) -> None:
    folder = data / "mnist_static_binarized"
    train, test = static(folder / "mnist_static_binarized.npz")
    rows = []
    for name, draws in (("VAE", 1), (f"IWAE, {DRAWS} draws", DRAWS)):
        for package, trained in (("pythae", by_pythae), ("pvi", by_pvi)):
            model, own, seconds = trained(train, test, draws, seed)
            nll = -model.score_samples(test, num_samples=SAMPLES, seed=0).log_evidence
            by_us = bound(model, objective(draws), test)
            rows.append([name, package, *mean_se(nll), by_us, own, seconds])
            print(*rows[-1], flush=True)
    report("vae", HEADER, rows, results, key="pythae", more={"pythae_meaning": MEANING})


def static(path: Path) -> tuple[Tensor, Tensor]:
    """Images of 0 and 1 `(N, 784)`, to train on and to test."""
    with np.load(path) as file:
        parts = file["train_packed"][:ROWS], file["test_packed"][:IMAGES]
    train, test = (torch.from_numpy(np.unpackbits(x, axis=1).astype(np.float32)) for x in parts)
    return train, test
