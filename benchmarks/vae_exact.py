"""Where a bound is known otherwise: a linear VAE, all terms of a diffusion, a VQ-VAE by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pvi
from benchmarks.common import report
from pvi.datasets import diabetes, images
from pvi.models.vae import VAE, VQVAE, DiffusionVAE, FullCovariance, Gaussian

LATENTS, STEPS, EPOCHS, ONE, ALL = 3, 1000, 10, 100, 20  # numbers of estimates
HEADER = ("model", "what", "a datum", "se", "difference", "se of that", "allowed")
MEANING = {
    "a datum": "nats; below the first row of each model what it is compared with",
    "difference": "from the row above it in the same model's first row",
    "allowed": "0.01 nats a datum; 3 standard errors of the difference; rounding",
}


def exact(data: Path, results: Path, *, seed: int, **_: Any) -> None:
    torch.manual_seed(seed)
    rows = [*linear(seed), *diffusion(seed), *codes(seed)]
    report("vae", HEADER, rows, results, key="exact", more={"exact_meaning": MEANING})


def against(model: str, first: tuple[str, float, float], *others: tuple) -> list[list[Any]]:
    """The rows of one model; others have what is allowed as their last element."""
    what, value, se = first
    rows = [[model, what, value, se, None, None, None]]
    for name, other, other_se, allowed in others:
        both = math.hypot(se, other_se)
        allowed = 3 * both if allowed is None else allowed
        rows.append([model, name, other, other_se, other - value, both, allowed])
    return rows


def linear(seed: int) -> list[list[Any]]:
    """Ten measurements of 442 patients; the maximum is that of Tipping and Bishop (1999), eq. 8."""
    x = torch.as_tensor(diabetes().x, dtype=torch.get_default_dtype())
    rows, size = x.shape
    posterior = FullCovariance(LATENTS)
    networks = {
        "encoder": nn.Linear(size, posterior.width),
        "decoder": nn.Linear(LATENTS, size),
    }
    model = VAE(size, LATENTS, likelihood=Gaussian(), posterior=posterior, **networks)
    model.fit(x, batch_size=rows, steps=STEPS, lr=0.03, seed=seed)
    bound = repeated(lambda: pvi.ELBO(20).bound(model.model, model.guide, x) / rows, 10)
    w, b = networks["decoder"].weight.detach().double(), networks["decoder"].bias.detach().double()
    s2 = (2 * model.likelihood.log_scale.detach().double()).exp()
    covariance = w @ w.T + s2 * torch.eye(size, dtype=torch.double)
    each = torch.distributions.MultivariateNormal(b, covariance).log_prob(x.double())
    best = float(maximum(x.double()))
    return against(
        "linear VAE",
        ("bound, 10 times 20 draws", *bound),
        ("log likelihood of its parameters", float(each.mean()), 0.0, 0.01),
        ("highest log likelihood (PPCA)", best, 0.0, 0.01),
    )


def maximum(x: Tensor) -> Tensor:
    """The highest mean log likelihood of probabilistic PCA, nats a datum."""
    values, size = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0), x.shape[1]
    s2 = values[LATENTS:].mean()
    log_det = values[:LATENTS].log().sum() + (size - LATENTS) * s2.log()
    return -0.5 * (size * math.log(2 * math.pi) + log_det + size)


def bits() -> tuple[Tensor, Tensor]:
    """Digits of 0 and 1, to train on and others."""
    found = images("digits")
    return (found.train > 0.5).float(), (found.test > 0.5).float()


def diffusion(seed: int) -> list[list[Any]]:
    train, test = bits()
    model = DiffusionVAE(tuple(train.shape[1:]), steps=10)
    model.fit(train, epochs=EPOCHS, lr=3e-3, seed=seed)
    one = model.bound(test, num_samples=ONE, seed=seed)
    programs = model.unrolled_model, model.unrolled_guide
    with torch.no_grad():
        every = [
            repeated(lambda: goal.bound(*programs, test) / len(test), ALL)  # noqa: B023
            for goal in (pvi.TraceMeanFieldELBO(), pvi.ELBO())
        ]
    return against(
        "diffusion, 10 steps",
        (f"one term, {ONE} estimates", *one),
        (f"all terms, exact KLs, {ALL} estimates", *every[0], None),
        (f"all terms, sampled KLs, {ALL} estimates", *every[1], None),
    )


def codes(seed: int) -> list[list[Any]]:
    train, test = bits()
    model = VQVAE(tuple(train.shape[1:]), 16, 4, channels=(16,))
    model.fit(train, epochs=EPOCHS, lr=3e-3, seed=seed).eval()
    rows = len(test)
    with torch.no_grad():
        vectors = model.codebook[model.encode(test).flatten(1)]  # (N, P, D)
        logits = model.decoder(vectors.mT.flatten(1)).reshape(test.shape)
        seen = torch.distributions.Bernoulli(logits=logits).log_prob(test).sum()
        by_hand = float(seen) / rows - model.positions * math.log(model.num_codes)
        goals = (pvi.ELBO(), pvi.TraceMeanFieldELBO())
        trace, closed = (goal.bound(model.model, model.guide, test) / rows for goal in goals)
    return against(
        "VQ-VAE",
        ("log p(x | codes) - P log K, by hand", by_hand, 0.0),
        ("Trace ELBO", trace, 0.0, 1e-4),
        ("ELBO, exact KL", closed, 0.0, 1e-4),
    )


def repeated(function: Any, times: int) -> tuple[float, float]:
    """Mean and standard error of some calls."""
    found = np.array([function() for _ in range(times)])
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(times))
