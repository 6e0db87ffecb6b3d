"""A picture of each model of the VAE family: reconstructions, samples, traversals, interpolations.

python examples/vae_gallery.py [--data digits|fashion-mnist|mnist|PATH] [--rows N] [--epochs 50]
    [--models vae ladder ...] [--out DIR]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvi
from pvi.datasets import images
from pvi.models.vae import (
    GAN,
    VAE,
    VQVAE,
    AutoregressiveModel,
    ConditionalVAE,
    DiffusionVAE,
    FactorVAE,
    FlowModel,
    HierarchicalVAE,
    KLAutoencoder,
    LadderVAE,
    SemiSupervisedVAE,
)
from pvi.nn import MADE, DenoisingMLP
from pvi.plots import plot_images

COLUMNS, LATENTS, CLASSES, LEVELS, KNOWN = 10, 16, 10, 17, 100
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """Images in [0, 1] and in black and white, with labels, and how long to train."""

    grey: Tensor
    bits: Tensor
    shown: Tensor
    shown_grey: Tensor
    labels: Tensor
    shown_labels: Tensor
    epochs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.grey.shape[1:])

    def trained(self, model: Any, data: Any = None, y: Any = None, **options: Any) -> Any:
        """The model after a fit, by default to black and white."""
        options = {"epochs": self.epochs, "batch_size": 100, "lr": 5e-3, "seed": 0, **options}
        return model.fit(self.bits if data is None else data, y, **options)


def line(a: Tensor, b: Tensor) -> Tensor:
    """Ten steps from a to b, `(10, *shape)`."""
    t = torch.linspace(0, 1, COLUMNS).reshape(-1, *[1] * a.dim())
    return a + t * (b - a)


def codes(model: Any, x: Tensor, *given: Any) -> Rows:
    """What latents are for: from the first image to the second, and two numbers moved alone."""
    z = model.encode(x, *given)
    more = tuple(y[:1].expand(COLUMNS) for y in given)
    rows = {"1 to 2": model.decode(line(z[0], z[1]), *more)}
    for i in z.var(0).argsort(descending=True)[:2].tolist():
        moved = z[:1].repeat(COLUMNS, 1)
        moved[:, i] = torch.linspace(-2.5, 2.5, COLUMNS)
        rows[f"number {i}"] = model.decode(moved, *more)
    return rows


def latent(model: Any, x: Tensor) -> Rows:
    """The rows of a model of latents without conditions."""
    rows = {"held out": x, "reconstructed": model.reconstruct(x)}
    return rows | {"samples": model.sample(COLUMNS, mean=True, seed=0)} | codes(model, x)


def vae(task: Task) -> Rows:
    return latent(task.trained(VAE(task.shape, LATENTS)), task.shown)


def beta_vae(task: Task) -> Rows:
    return latent(task.trained(VAE(task.shape, LATENTS, beta=2.0)), task.shown)


def iwae(task: Task) -> Rows:
    goal = pvi.IWAE(8, gradient="path")
    return latent(task.trained(VAE(task.shape, LATENTS), objective=goal), task.shown)


def factor(task: Task) -> Rows:
    return latent(task.trained(FactorVAE(task.shape, LATENTS, gamma=5.0)), task.shown)


def conditional(task: Task) -> Rows:
    model = ConditionalVAE(task.shape, CLASSES, latents=LATENTS)
    task.trained(model, task.bits, task.labels)
    return classes(model, task)


def semi_supervised(task: Task) -> Rows:
    known = torch.where(torch.arange(len(task.labels)) < KNOWN, task.labels, -1)
    alpha = 0.1 * len(known) / KNOWN  # as in the paper
    model = SemiSupervisedVAE(task.shape, CLASSES, latents=LATENTS, alpha=alpha)
    return classes(task.trained(model, task.bits, known), task)


def classes(model: Any, task: Task) -> Rows:
    """Rows of a model with labels: besides, one z as each class."""
    x, y, each = task.shown, task.shown_labels, torch.arange(CLASSES)
    z = model.encode(x, y)
    rows = {"held out": x, "reconstructed": model.reconstruct(x, y)}
    rows["samples of 0 to 9"] = model.sample(CLASSES, each, mean=True, seed=0)
    rows |= {f"style of {i}": model.decode(z[[i - 1]].repeat(CLASSES, 1), each) for i in (1, 2)}
    return rows | {"1 to 2": codes(model, x, y)["1 to 2"]}


def ladder(task: Task) -> Rows:
    goal = pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(2.0))
    return layers(task.trained(LadderVAE(task.shape, (LATENTS, 8)), objective=goal), task.shown)


def hierarchical(task: Task) -> Rows:
    model = HierarchicalVAE(task.shape, (LATENTS, 8))
    goal = pvi.BetaELBO(pvi.schedules.linear(max(task.epochs // 2, 1), unit="epoch"))
    return layers(task.trained(model, objective=goal), task.shown)


def layers(model: Any, x: Tensor) -> Rows:
    """Rows of a model of two layers: what each of them knows."""
    rows = {"held out": x}
    rows |= {f"from z_{i}": model.reconstruct(x, level=i) for i in (1, 2)}
    rows["samples"] = model.sample(COLUMNS, mean=True, seed=0)
    for i in (1, 2):
        z = model.encode(x, level=i)
        rows[f"1 to 2 in z_{i}"] = model.decode(line(z[0], z[1]), level=i)
    return rows


def vq_vae(task: Task) -> Rows:
    model = task.trained(VQVAE(task.shape, 32, 8, channels=(32,)))
    x = task.shown
    rows = {"held out": x, "reconstructed": model.reconstruct(x)}
    rows["uniform prior"] = model.sample(COLUMNS, mean=True, seed=0)
    model.fit_prior(task.bits, epochs=task.epochs, batch_size=100, lr=5e-3, seed=0)
    rows["learned prior"] = model.sample(COLUMNS, mean=True, seed=0)
    first, second = model.encode(x[:2]).flatten(1)
    taken = torch.linspace(0, len(first), COLUMNS).round().long()
    mixed = [torch.cat([second[:n], first[n:]]) for n in taken]
    return rows | {
        "1 to 2, by codes": model.decode(torch.stack(mixed).reshape(-1, *model.code_shape))
    }


def kl_autoencoder(task: Task) -> Rows:
    model = KLAutoencoder(task.shape, 2, channels=(16, 32), adversary_start=task.epochs // 2)
    return latent(task.trained(model, task.grey, lr=2e-3), task.shown_grey)


def diffusion(task: Task) -> Rows:
    direct = DiffusionVAE(task.shape, steps=100, network=DenoisingMLP(task.shape, 512))
    task.trained(direct, epochs=2 * task.epochs, lr=3e-3)
    first = task.trained(VAE(task.shape, LATENTS))
    second = DiffusionVAE(task.shape, steps=100, autoencoder=first)
    task.trained(second, epochs=2 * task.epochs, lr=3e-3)
    models = {"of images": direct, "a VAE's prior": first, "of its latents": second}
    rows = {name: m.sample(COLUMNS, mean=True, seed=0) for name, m in models.items()}
    return {"held out": task.shown, **rows}


def pixel_cnn(task: Task) -> Rows:
    return written(task.trained(AutoregressiveModel(task.shape)), task.shown)


def made(task: Task) -> Rows:
    model = AutoregressiveModel(task.shape, network=MADE(task.shape, 1, (256, 256)))
    return written(task.trained(model), task.shown)


def written(model: AutoregressiveModel, x: Tensor) -> Rows:
    """Rows of an autoregressive model: besides, the lower half written anew."""
    rows = {"held out": x, "samples": model.sample(COLUMNS, seed=0)}
    rows["more samples"] = model.sample(COLUMNS, seed=1)
    order, half = model.network.order.tolist(), x[0].numel() // 2
    for seed in (0, 1):
        done = x.flatten(1).clone()
        done[:, half:] = 0
        with model.evaluating(seed):
            for i in (i for i in order if i >= half):
                done[:, i] = model.density.given(done.reshape(x.shape)).sample().flatten(1)[:, i]
        rows[f"lower half, {'again' if seed else 'new'}"] = done.reshape(x.shape)
    return rows


def flow(task: Task) -> Rows:
    options = {"transforms": 3, "hidden_features": (128, 128)}
    model = FlowModel(task.shape, options=options, levels=LEVELS)
    task.trained(model, (task.grey * (LEVELS - 1)).round())
    x = (task.shown_grey * (LEVELS - 1)).round()
    z = model.encode(x)
    rows = {"held out": x, "samples": model.sample(COLUMNS, seed=0)}
    rows |= {
        "more samples": model.sample(COLUMNS, seed=1),
        "1 to 2": model.decode(line(z[0], z[1])),
    }
    return {name: row.clamp(0, LEVELS - 1) / (LEVELS - 1) for name, row in rows.items()}


def gan(task: Task) -> Rows:
    model = task.trained(
        GAN(task.shape, LATENTS), 2 * task.grey - 1, epochs=2 * task.epochs, lr=1e-3
    )
    torch.manual_seed(0)
    rows = {"samples": model.sample(COLUMNS, seed=0), "more samples": model.sample(COLUMNS, seed=1)}
    rows |= {f"from a to b, {i}": model.decode(line(*torch.randn(2, LATENTS))) for i in (1, 2)}
    return {"held out": task.shown_grey} | {k: (v.clamp(-1, 1) + 1) / 2 for k, v in rows.items()}


MODELS: dict[str, Callable[[Task], Rows]] = {
    "vae": vae,
    "beta_vae": beta_vae,
    "iwae": iwae,
    "factor": factor,
    "conditional": conditional,
    "semi_supervised": semi_supervised,
    "ladder": ladder,
    "hierarchical": hierarchical,
    "vq_vae": vq_vae,
    "kl_autoencoder": kl_autoencoder,
    "diffusion": diffusion,
    "pixel_cnn": pixel_cnn,
    "made": made,
    "flow": flow,
    "gan": gan,
}


def task(source: str, epochs: int, rows: int | None = None) -> Task:
    found = images(source)
    if found.labels is None or found.test_labels is None:
        raise SystemExit(f"{source} has no labels, which some models need")
    return Task(
        grey=found.train[:rows],
        bits=(found.train[:rows] > 0.5).float(),
        shown=(found.test[:COLUMNS] > 0.5).float(),
        shown_grey=found.test[:COLUMNS],
        labels=found.labels[:rows],
        shown_labels=found.test_labels[:COLUMNS],
        epochs=epochs,
    )


def draw(name: str, given: Task, folder: Path) -> None:
    """Train a model and write its picture."""
    start = time.perf_counter()
    torch.manual_seed(0)
    rows = {label: x.mean(1).detach() for label, x in MODELS[name](given).items()}
    figure = plot_images(rows, COLUMNS)
    figure.savefig(folder / f"gallery_{name}.png", dpi=60, bbox_inches="tight")
    print(f"gallery_{name}.png, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--rows", type=int, help="images to train on, by default all")
    parser.add_argument("--models", nargs="*", choices=[*MODELS, []], help="by default all")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    given = task(options.data, options.epochs, options.rows)
    for name in options.models or MODELS:
        draw(name, given, options.out)


if __name__ == "__main__":
    main()
