"""The problems of `benchmarks.speed` in plain PyTorch, as one would write them without Pyro.

The same models, guides, draws and bounds; all latents of a normal guide are one vector, constants
are numbers, entropies and KLs closed forms where they are one line.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from benchmarks.speed_problems import WORDS, Documents, Encoder, Problem, Topics, decoder

LOG_2PI = math.log(2 * math.pi)
HALF = math.log(2.0)  # of the densities of half-normals
Loss = Callable[..., Tensor]


def eight_schools(u: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    mu, log_tau, effect = u[:, :1], u[:, 1:2], u[:, 2:]
    tau = log_tau.exp()
    priors = log_tau - 0.02 * mu**2 - torch.log1p((tau / 5) ** 2) + math.log(2 / (25 * math.pi))
    rows = -0.5 * (effect**2 + ((y - mu - tau * effect) / sigma) ** 2) - sigma.log()
    return priors[:, 0] + rows.sum(-1) - 8.5 * LOG_2PI


def logistic(u: Tensor, x: Tensor, group: Tensor, y: Tensor) -> Tensor:
    """Of latents `(K, D)`: w, mu, log tau, a."""
    p = x.shape[1]
    w, mu, log_tau, a = u[:, :p], u[:, p], u[:, p + 1], u[:, p + 2 :]
    tau, n = log_tau.exp(), a.shape[1]
    priors = log_tau + HALF - 0.5 * (w**2).sum(-1) - 0.5 * (mu**2 + tau**2) - n * log_tau
    spread = -0.5 * (((a - mu[:, None]) / tau[:, None]) ** 2).sum(-1)
    logits = a[:, group] + w @ x.T
    return priors + spread + (y * logits - softplus(logits)).sum(-1) - 0.5 * (p + 2 + n) * LOG_2PI


def radon(u: Tensor, x: Tensor, county: Tensor, y: Tensor) -> Tensor:
    """Of mu, beta, log sigma, log noise, effects."""
    mu, beta, log_sigma, log_noise, raw = u[:, :1], u[:, 1:3], u[:, 3], u[:, 4], u[:, 5:]
    sigma, noise = log_sigma.exp(), log_noise.exp()
    priors = log_sigma + log_noise + 2 * HALF - 3 * math.log(10.0)
    priors = priors - 0.005 * (mu[:, 0] ** 2 + (beta**2).sum(-1)) - 0.5 * (sigma**2 + noise**2)
    mean = (mu + sigma[:, None] * raw)[:, county] + beta @ x.T
    fit = -0.5 * (((y - mean) / noise[:, None]) ** 2).sum(-1) - len(y) * log_noise
    count = u.shape[1] + len(y)
    return priors - 0.5 * (raw**2).sum(-1) + fit - 0.5 * count * LOG_2PI


def bnn(u: Tensor, x: Tensor, y: Tensor, hidden: int = 50) -> Tensor:
    p = x.shape[1]
    w1, b1, w2, b2, log_sigma = u.split([p * hidden, hidden, hidden, 1, 1], -1)
    priors = -0.5 * (p * w1.square().sum(-1) + hidden * w2.square().sum(-1))
    priors = priors - 0.5 * (b1.square().sum(-1) + b2[:, 0].square())
    scales = 0.5 * hidden * (p * math.log(p) + math.log(hidden))
    h = torch.relu(x @ w1.unflatten(-1, (p, -1)) + b1[:, None])
    mean = (h @ w2[..., None])[..., 0] + b2
    sigma = log_sigma.exp()
    fit = -0.5 * ((y - mean) / sigma).square().sum(-1) - len(y) * log_sigma[:, 0]
    last = log_sigma[:, 0] + HALF - 0.5 * sigma[:, 0] ** 2
    return priors + scales + last + fit - 0.5 * (u.shape[1] + len(y)) * LOG_2PI


def normal_loss(
    log_joint: Loss, start: Tensor, particles: int, device: str
) -> tuple[list[Tensor], Loss]:
    """Independent normals for all latents, and minus their bound."""
    size = len(start)
    loc = start.to(device).requires_grad_()
    log_scale = torch.full((size,), math.log(0.1), device=device, requires_grad=True)
    entropy = 0.5 * size * (1 + LOG_2PI)

    def loss(*data: Tensor) -> Tensor:
        noise = torch.randn(particles, size, device=device)
        u = loc + log_scale.exp() * noise
        return -(log_joint(u, *data).mean() + log_scale.sum() + entropy)

    return [loc, log_scale], loss


def vae(problem: Problem, device: str) -> tuple[list[Tensor], Loss]:
    sizes, draws = problem.sizes, problem.particles
    encode, decode = Encoder(**sizes).to(device), decoder(**sizes).to(device)

    def elbo(y: Tensor) -> Tensor:
        loc, scale = encode(y)
        logits = decode(loc + scale * torch.randn_like(scale))
        fit = binary_cross_entropy_with_logits(logits, y, reduction="sum")
        return fit + _kl(loc, scale)

    def iwae(y: Tensor) -> Tensor:
        loc, scale = encode(y)
        noise = torch.randn(draws, *scale.shape, device=device)
        z = loc + scale * noise
        logits = decode(z)
        misfit = binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
        weights = (0.5 * (noise**2 - z**2) + scale.log()).sum(-1) - misfit.sum(-1)
        return -(weights.logsumexp(0) - math.log(draws)).sum()

    loss = iwae if problem.bound == "iwae" else elbo
    return [*encode.parameters(), *decode.parameters()], loss


def prodlda(problem: Problem, device: str) -> tuple[list[Tensor], Loss]:
    documents = Documents(**problem.sizes).to(device)
    topics = Topics(**problem.sizes).to(device)
    constant = math.lgamma(WORDS + 1.0)

    def loss(y: Tensor) -> Tensor:
        loc, scale = documents(y)
        z = loc + scale * torch.randn_like(scale)
        fit = (
            (y * topics(z.softmax(-1)).log_softmax(-1)).sum()
            - torch.lgamma(y + 1).sum()
            + len(y) * constant
        )
        return _kl(loc, scale) - fit

    return [*documents.parameters(), *topics.parameters()], loss


def _kl(loc: Tensor, scale: Tensor) -> Tensor:
    return 0.5 * (loc**2 + scale**2 - 1).sum() - scale.log().sum()


def _start(name: str, data: tuple[Tensor, ...]) -> tuple[Loss, int]:
    """The log density of a problem with a normal guide, and how many latents it has."""
    sizes = {
        "eight_schools": lambda: 10,
        "logistic": lambda: data[0].shape[1] + 22,
        "radon": lambda: 90,
        "bnn": lambda: 50 * data[0].shape[1] + 102,
    }
    densities: dict[str, Loss] = {
        "eight_schools": eight_schools,
        "logistic": logistic,
        "radon": radon,
        "bnn": bnn,
    }
    return densities[name], sizes[name]()


def by_hand(problem: Problem, device: str = "cpu") -> tuple[list[Tensor], Loss]:
    """Parameters, and the loss as a function of a batch."""
    networks = {"vae": partial(vae, problem), "prodlda": partial(prodlda, problem)}
    if problem.like in networks:
        return networks[problem.like](device)
    density, size = _start(problem.like, problem.tensors())
    return normal_loss(density, torch.zeros(size), problem.particles, device)
