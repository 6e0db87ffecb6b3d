"""dSprites: the mutual information gap and the ELBO against beta, for beta-VAE and beta-TC.

On a grid of 46,080 of the 737,280 images, shrunk to 32 x 32 pixels, with a small perceptron instead
of convolutions, and few steps: reduced, so comparable with published numbers in kind only.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

import pvi
from benchmarks.common import report, timed
from pvi.diagnostics import mutual_information_gap
from pvi.figures import new_figure
from pvi.models.vae import VAE

SHAPE, LATENTS, HIDDEN = (1, 32, 32), 10, (200, 200)
BATCH, RATE = 64, 1e-3
BETAS = {"beta-VAE": (1.0, 2.0, 4.0, 8.0), "beta-TC": (4.0, 8.0)}  # at 1 both are the ELBO
FACTORS = ("shape", "scale", "orientation", "x", "y")
HEADER = ("method", "beta", "seed", "MIG", "ELBO", "information", "active", *FACTORS, "seconds")
MEANING = {
    "MIG": "mutual information gap of all 46,080 images, 2,000 draws; from 0 to 1",
    "ELBO": "at beta = 1, of all images that were trained on, nats",
    "information": "most that one latent knows of each factor, summed over factors, nats",
    ", ".join(FACTORS): "the gap of each, in shares of its entropy",
    "beta-TC": "weight of the total correlation alone",
}


def sprites(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of 0 and 1 `(N, 1, 32, 32)`, a pixel where half of four are on, and factors."""
    with np.load(folder / "dsprites_grid46080" / "dsprites_grid46080.npz") as file:
        packed, factors = file["imgs_packed"], file["latents_classes"]
    whole = torch.from_numpy(np.unpackbits(packed, axis=1).reshape(-1, 1, 64, 64))
    parts = [(avg_pool2d(part.float(), 2) >= 0.5).float() for part in whole.split(4096)]
    return torch.cat(parts), torch.from_numpy(factors.astype(np.int64))


def objective(method: str, beta: float) -> pvi.Objective:
    if method == "beta-VAE":
        return pvi.BetaELBO(beta, kl="exact")
    return pvi.ELBO(weighting=pvi.BetaTC(beta))


def dsprites(
    data: Path,
    results: Path,
    *,
    steps: int,
    seed: int,
    seeds: int,
    picture: Path | None,
    **_: Any,
) -> None:
    x, factors = sprites(data)
    rows: list[list[Any]] = []
    more = {"dsprites_steps": steps, "dsprites_meaning": MEANING}
    for one in range(seed, seed + seeds):
        for method, beta in ((name, beta) for name, betas in BETAS.items() for beta in betas):
            torch.manual_seed(one)
            model = VAE(SHAPE, LATENTS, hidden=HIDDEN)
            options: dict[str, Any] = {"steps": steps, "batch_size": BATCH, "lr": RATE}
            with timed() as seconds:
                model.fit(x, objective=objective(method, beta), seed=one, **options)
            rows.append([method, beta, one, *looked_at(model, x, factors), *seconds])
            print(*rows[-1], flush=True)
        report("vae", HEADER, rows, results, key="dsprites", more=more)
    if picture is not None:
        drawn([dict(zip(HEADER, row, strict=True)) for row in rows], picture)


def looked_at(model: VAE, x: Tensor, factors: Tensor) -> list[Any]:
    with torch.no_grad():
        parts = x.split(1024)
        means, raw = torch.cat([model.encoder(part) for part in parts]).chunk(2, -1)
        found = model.posterior(torch.cat([means, raw], -1))
        bound = sum(pvi.TraceMeanFieldELBO().bound(model.model, model.guide, p) for p in parts)
    mig = mutual_information_gap(found, factors)
    active = int((means.var(0, correction=0) > 0.01).sum())
    most = float(mig.information.amax(0).sum())
    gaps = [float(gap) for gap in mig.gaps]
    return [mig.gap, bound / len(x), most, active, *gaps]


def drawn(rows: list[dict[str, Any]], path: Path) -> None:
    """Medians of the seeds as lines, and each seed as a point.

    Args:
        rows: of the part's table.
        path: of the PNG.
    """
    figure, ticks = new_figure(8, 3.2), sorted({row["beta"] for row in rows})
    for axes, what in zip(figure.subplots(1, 2), ("MIG", "ELBO"), strict=True):
        for marker, method in zip("os", BETAS, strict=True):
            mine = [r for r in rows if r["method"] == method or r["beta"] == 1.0]
            betas = sorted({r["beta"] for r in mine})
            values = [[r[what] for r in mine if r["beta"] == beta] for beta in betas]
            line, *_ = axes.plot(betas, [np.median(v) for v in values], label=method)
            flat = [(beta, v) for beta, vs in zip(betas, values, strict=True) for v in vs]
            axes.scatter(*zip(*flat, strict=True), s=14, marker=marker, color=line.get_color())
        axes.set(xlabel="beta", ylabel=what if what == "MIG" else "ELBO at beta = 1, nats")
        axes.set(xscale="log", xticks=ticks, xticklabels=[f"{beta:g}" for beta in ticks])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")
