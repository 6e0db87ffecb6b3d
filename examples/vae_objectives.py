"""Which objective when: one network, several objectives, the same evaluation of all.

The ELBO at beta = 1 and the log evidence (importance sampling) of held-out images, the KL and the
latents in use. A beta above 1 gives evidence for fewer, separate latents; IWAE gives ELBO for
evidence; free bits keep latents alive.

    python examples/vae_objectives.py [--data digits|fashion-mnist|mnist|PATH] [--epochs 100]
"""

import argparse

import torch

import pvi
from pvi.datasets import Binarized, images
from pvi.models.vae import VAE
from pvi.text import table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--epochs", type=int, default=100)
options = parser.parse_args()

found = images(options.data)
shape = tuple(found.train.shape[1:])
train, test = Binarized(found.train), Binarized(found.test).fixed(seed=0)
objectives = {
    "ELBO": pvi.TraceMeanFieldELBO(),
    "beta = 4": pvi.BetaELBO(4.0),
    "beta from 0 to 1": pvi.BetaELBO(pvi.schedules.linear(500)),
    "free bits": pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(0.2)),
    "IWAE, 8 draws": pvi.IWAE(8),
    "the same, path": pvi.IWAE(8, gradient="path"),
}

rows = []
for name, objective in objectives.items():
    torch.manual_seed(0)
    model = VAE(shape, latents=16).fit(train, objective=objective, epochs=options.epochs, seed=0)
    elbo = pvi.TraceMeanFieldELBO().bound(model.model, model.guide, test) / len(test)
    evidence = model.score(test[:200])
    site = pvi.latents(pvi.Posterior(model.model, model.guide, test))["z"]
    rows.append([name, f"{elbo:.2f}", f"{evidence:.2f}", f"{site.kl_dims.sum():.2f}"])
    rows[-1].append(f"{int(site.active.sum())} of {len(site.active)}")
print(table(["objective", "ELBO", "log evidence", "KL", "active"], rows))
