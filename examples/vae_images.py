"""A VAE of images: fit, evidence of held-out images, pictures.

python examples/vae_images.py [--data digits|fashion-mnist|mnist|PATH] [--epochs 100]
"""

import argparse

import pvi
from pvi.datasets import Binarized, images
from pvi.models.vae import VAE, Vamp
from pvi.plots import plot_images

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--out", default="vae_images.png")
options = parser.parse_args()

found = images(options.data)
shape = tuple(found.train.shape[1:])
train, test = Binarized(found.train), Binarized(found.test).fixed(seed=0)

model = VAE(shape, latents=16, prior=Vamp(shape, 100))
model.fit(train, objective=pvi.IWAE(8, gradient="path"), epochs=options.epochs, seed=0)

score = model.score_samples(test[:200], num_samples=1000, seed=0)
se = score.log_evidence.std() / len(score.log_evidence) ** 0.5
print(f"log evidence of a held-out image: {score.log_evidence.mean():.2f} ± {se:.2f} nats")
print(pvi.latents(pvi.Posterior(model.model, model.guide, test)))

rows = {
    "held out": test[:10],
    "reconstructed": model.reconstruct(test[:10]),
    "samples": model.sample(10, mean=True, seed=0),
}
plot_images({name: x.mean(1) for name, x in rows.items()}).savefig(options.out)
