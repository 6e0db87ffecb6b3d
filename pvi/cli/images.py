"""A model of the VAE family on images: fit, evaluation, pictures, one page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvi
from pvi.cli.program import UsageError, make_objective
from pvi.datasets import Binarized, Images, images
from pvi.models import vae as family
from pvi.nn import ConvDecoder, ConvEncoder, UNet
from pvi.page import Numbers, Picture, Section, write_page
from pvi.plots import plot_images, plot_latents
from pvi.text import table

COLUMNS, TRAVERSED, SPAN = 10, 6, 2.5
CHANNELS = (32, 64)
LIKELIHOODS: dict[str, Callable[[int], family.Likelihood]] = {
    "bernoulli": lambda levels: family.Bernoulli(),
    "continuous-bernoulli": lambda levels: family.ContinuousBernoulli(),
    "gaussian": lambda levels: family.Gaussian(),
    "laplace": lambda levels: family.Laplace(),
    "levels": lambda levels: family.DiscretizedLogistic(levels),
}
PRIORS: dict[str, Callable[[Any, int], family.Prior]] = {
    "standard": lambda shape, d: family.Standard(d),
    "mixture": lambda shape, d: family.Mixture(d, 50),
    "vamp": lambda shape, d: family.Vamp(shape, 100),
    "flow": lambda shape, d: family.FlowPrior(d),
}
MODELS = ("vae", "conv", "ladder", "vq", "diffusion", "autoregressive", "flow")
WITH_PRIOR = ("vae", "conv", "ladder")
NOT_WITH = {  # likelihoods that say nothing of the model, or that it has no rule for
    "diffusion": ("continuous-bernoulli",),
    "flow": ("continuous-bernoulli", "laplace"),
}


def run(
    out: Path,
    *,
    data: str,
    model: str,
    likelihood: str,
    prior: str,
    objective: str,
    latents: int,
    levels: int,
    epochs: int,
    batch_size: int,
    samples: int,
    seed: int,
) -> str:
    """Fit, evaluate on held-out images and write the page; the verdict on convergence."""
    for name, value, known in (
        ("--model", model, MODELS),
        ("--likelihood", likelihood, LIKELIHOODS),
        ("--prior", prior, PRIORS),
    ):
        if value not in known:
            raise UsageError(f"{name}: expected one of {', '.join(known)}, got {value}")
    _check_parts(model, likelihood, prior)
    found = images(data)
    train, test = _as_data(found, likelihood, levels, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _model(model, tuple(test.shape[1:]), latents, LIKELIHOODS[likelihood](levels), prior)
    options: dict[str, Any] = {"objective": make_objective(objective)} if objective else {}
    fit = made.fit(train, epochs=epochs, batch_size=batch_size, seed=seed, **options).result()
    print(f"\n{type(made).__name__} of {len(found.train):,} images: {fit}\n")
    made.save(out / "model")
    numbers = _numbers(made, test, samples, seed)
    print(table(("", "", ""), [list(row) for row in numbers]), end="\n\n")
    pictures = _pictures(made, test, seed)
    caption = "Bound of all training images at beta = 1, nats"
    pictures += [Picture.of(fit.plot(), "bound.png", caption)]
    for picture in pictures:
        picture.save(out)
    lead = f"{type(made).__name__} with {likelihood} likelihood, {data}, {epochs} epochs."
    title = f"pvi vae: {Path(data).name}"
    parts = [Numbers(numbers), *fit.notes, *pictures]
    write_page(out / "index.html", title, lead, [Section("Held-out images", parts)])
    return "converged" if fit.converged else f"not converged: {fit.reason}"


def _check_parts(model: str, likelihood: str, prior: str) -> None:
    """Refuse options that the model would not use."""
    if model not in WITH_PRIOR and prior != "standard":
        raise UsageError(f"--prior {prior}: --model {model} has no such prior: leave it out")
    if likelihood in NOT_WITH.get(model, ()):
        others = ", ".join(name for name in LIKELIHOODS if name not in NOT_WITH[model])
        raise UsageError(f"--likelihood {likelihood}: --model {model} takes one of {others}")


def _as_data(found: Images, likelihood: str, levels: int, seed: int) -> tuple[Any, Tensor]:
    """Data to train on and to test on, such as the likelihood takes."""
    if likelihood == "bernoulli":
        return Binarized(found.train), Binarized(found.test).fixed(seed)
    if likelihood == "levels":
        return tuple((x * (levels - 1)).round() for x in (found.train, found.test))  # type: ignore[return-value]
    return found.train, found.test


def _model(kind: str, shape: Any, latents: int, likelihood: family.Likelihood, prior: str) -> Any:
    if kind == "ladder":
        layers = latents, max(latents // 2, 1)
        top = PRIORS[prior](shape, layers[-1])
        return family.LadderVAE(shape, layers, likelihood=likelihood, prior=top)
    if kind == "vq":
        return family.VQVAE(shape, likelihood=likelihood)
    if kind == "diffusion":
        return family.DiffusionVAE(shape, network=UNet(shape, CHANNELS), likelihood=likelihood)
    if kind == "autoregressive":
        return family.AutoregressiveModel(shape, likelihood=likelihood)
    if kind == "flow":
        whole = 2 if isinstance(likelihood, family.Bernoulli) else None
        return family.FlowModel(shape, levels=getattr(likelihood, "levels", whole))
    parts: dict[str, Any] = {}
    if kind == "conv":
        seen = tuple(likelihood.features(torch.zeros(1, *shape)).shape[1:])
        wide = (likelihood.width * shape[0], *shape[1:])
        parts = {"encoder": ConvEncoder(seen, 2 * latents, CHANNELS)}
        parts["decoder"] = ConvDecoder(latents, wide, CHANNELS)
    made = PRIORS[prior](shape, latents)
    return family.VAE(shape, latents, likelihood=likelihood, prior=made, **parts)


def _numbers(made: Any, test: Tensor, samples: int, seed: int) -> list[tuple[str, str, str]]:
    """What is known of held-out images: the bound, and where it can be told, the evidence."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        bound = pvi.TraceMeanFieldELBO().bound(made.model, made.guide, test) / len(test)
    rows = [("ELBO", f"{bound:.2f}", f"nats an image, {len(test):,} images, beta = 1")]
    if isinstance(made, family.VAE | family.LadderVAE) and samples:
        some = test[:200]
        found = made.score_samples(some, num_samples=samples, seed=seed)
        mean = float(found.log_evidence.mean())
        se = float(found.log_evidence.std()) / len(some) ** 0.5
        remark = f"± {se:.2f} over images; {samples:,} importance samples each, {len(some)} images"
        rows.append(("log evidence", f"{mean:.2f}", remark))
    if isinstance(made, family.VAE | family.LadderVAE):
        for site in pvi.latents(pvi.Posterior(made.model, made.guide, test[:1000])).sites:
            active = f"{int(site.active.sum())} of {len(site.active)}"
            remark = f"KL {float(site.kl_dims.nansum()):.2f} nats"
            rows.append((f"active units of {site.name}", active, remark))
    if isinstance(made, family.VQVAE):
        rows.append(("perplexity of the codebook", f"{made.perplexity(test):.1f}", ""))
    return rows


def _pictures(made: Any, test: Tensor, seed: int) -> list[Picture]:
    """Reconstructions, samples, and for vectors of latents traversals and interpolations."""
    shown = test[:COLUMNS]
    found = []
    means = not isinstance(made, family.ExactModel)
    if means:
        rows = {"held out": shown, "reconstructed": made.reconstruct(shown)}
        found.append(("reconstructions.png", rows, "Held-out images and their reconstructions"))
    drawn = made.sample(3 * COLUMNS, mean=means, seed=seed).split(COLUMNS)
    rows = {"samples" + " " * i: part for i, part in enumerate(drawn)}
    found.append(
        (
            "samples.png",
            rows,
            "Images from the model" + ": means given draws of the latents" * means,
        )
    )
    if isinstance(made, family.VAE):
        codes = made.encode(test[:500])
        found.append(
            ("traversals.png", _traversals(made, codes), "Latents one by one, -2.5 to 2.5")
        )
        found.append(("interpolations.png", _lines(made, codes), "From one image to another"))
    pictures = [
        Picture.of(plot_images({k: _grey(x) for k, x in rows.items()}, COLUMNS), name, caption)
        for name, rows, caption in found
    ]
    if isinstance(made, family.VAE | family.LadderVAE):
        known = pvi.latents(pvi.Posterior(made.model, made.guide, test[:1000]))
        pictures.append(Picture.of(plot_latents(known), "latents.png", "KL of each latent number"))
    return pictures


def _traversals(made: Any, codes: Tensor) -> dict[str, Tensor]:
    """The latents that vary most, moved one by one from the first image's."""
    rows = {}
    for i in codes.var(0).argsort(descending=True)[:TRAVERSED].tolist():
        moved = codes[:1].repeat(COLUMNS, 1)
        moved[:, i] = torch.linspace(-SPAN, SPAN, COLUMNS)
        rows[f"z[{i}]"] = made.decode(moved)
    return rows


def _lines(made: Any, codes: Tensor) -> dict[str, Tensor]:
    share = torch.linspace(0, 1, COLUMNS)[:, None]
    pairs = [(0, 1), (2, 3), (4, 5)]
    return {f"{a} to {b}": made.decode(torch.lerp(codes[a], codes[b], share)) for a, b in pairs}


def _grey(x: Tensor) -> Tensor:
    return x.mean(1).cpu()
