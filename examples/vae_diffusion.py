"""Diffusion as an ELBO: on images, and on the latents of a VAE (latent diffusion).

python examples/vae_diffusion.py [--data digits|fashion-mnist|mnist|PATH] [--epochs 300]
"""

import argparse

from pvi.datasets import Binarized, images
from pvi.models.vae import VAE, DiffusionVAE
from pvi.nn import DenoisingMLP
from pvi.plots import plot_images

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--out", default="vae_diffusion.png")
options = parser.parse_args()

found = images(options.data)
shape = tuple(found.train.shape[1:])
train, test = Binarized(found.train), Binarized(found.test).fixed(seed=0)

direct = DiffusionVAE(shape, steps=100, network=DenoisingMLP(shape, 512))
direct.fit(train, epochs=options.epochs, lr=3e-3, seed=0)

vae = VAE(shape, latents=16).fit(train, epochs=options.epochs, seed=0)
latent = DiffusionVAE(shape, steps=100, autoencoder=vae)
latent.fit(train, epochs=options.epochs, lr=3e-3, seed=0)

for name, model in (("images", direct), ("latents of a VAE", latent)):
    bound, se = model.bound(test, num_samples=20, seed=0)
    print(f"diffusion of {name}: ELBO of a held-out image {bound:.2f} ± {se:.2f} nats")

rows = {
    "images": direct.sample(10, mean=True, seed=0),
    "VAE": vae.sample(10, mean=True, seed=0),
    "latents": latent.sample(10, mean=True, seed=0),
}
plot_images({name: x.mean(1) for name, x in rows.items()}).savefig(options.out)
