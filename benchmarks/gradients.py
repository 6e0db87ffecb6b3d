"""The noise of pvi's gradients: variances, and signal-to-noise ratios as K grows, beside Pyro.

Rainforth et al. (2018) show that the signal-to-noise ratio (SNR) of IWAE's usual gradient falls as
K^-1/2 for the encoder while it rises as K^1/2 for the model. With doubly reparameterised gradients
(Tucker et al. 2019), here gradient="path", it rises for the encoder too. As in these papers the SNR
is |mean| / sd of each parameter's gradient, averaged over the parameters, at parameters moved off
their optimum by normal noise. The theory is about weights that K draws can average, as they can
near the optimum; the setting "far" shows what happens where they can't. All gradients are unbiased,
so the mean is that of "path", which is known best: where the SNR is small, an estimator's own mean
is mostly error. That the means agree is in the first table.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from pvi.figures import new_figure, tidy
from tests.scenarios import isolated, param, randn

ROWS, DATA, LATENT = 32, 10, 5
SIGNAL, NOISE = 1.5, 1.0  # sds of the data along and around the latent directions
OFFSETS = {"near": 0.01, "far": 0.1}  # sd of the noise added to optimal parameters
GUIDE, MODEL = ("weight", "bias", "log_scale"), ("loading", "mean")
PARTICLES = [2**i for i in range(10)]
SCORE_LIMIT = 128  # leaving out each of K draws costs K^2
ASYMPTOTIC = 8  # slopes are fitted from this K on: the theory is about large K
BOOTSTRAP = 200
CHUNK = 2**16  # latent draws in one evaluation
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "gradient_snr.png"
PYRO = {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 2}

LOOKS = {  # gradient -> its name in the figure, and how it is drawn
    "path": ("path (DReG)", {"color": "C0", "marker": "o"}),
    "reparam": ("reparam", {"color": "C1", "marker": "s"}),
    "score": ("score (VIMCO)", {"color": "C2", "marker": "^"}),
    "Pyro": ("Pyro's RenyiELBO", {"color": "black", "marker": "x", "ls": "none", "zorder": 3}),
}
Curves = dict[tuple[str, str], dict[int, Tensor]]  # (side, gradient) -> K -> `(1 + BOOTSTRAP,)`


@dataclass(frozen=True)
class VAE:
    """z ~ N(0, I), x | z ~ N(loading z + mean, 1), and q(z | x) = N(weight x + bias, scale).

    Loadings are orthogonal, so the posterior is a product of normals and the best encoder known.
    """

    x: Tensor
    start: dict[str, Tensor]

    def programs(self, copies: int) -> tuple[Callable, Callable]:
        """Model and guide with `copies` independent copies of data and parameters.

        The gradient of one evaluation then has a row for each copy: independent replicates.
        """

        def get(name: str) -> Tensor:
            value = self.start[name]
            return param(name, value.expand(copies, *value.shape))

        def plates() -> Any:
            return pyro.plate("copies", copies, dim=-2), pyro.plate("rows", ROWS, dim=-1)

        def model(x: Tensor) -> None:
            outer, inner = plates()
            with outer, inner:
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                loc = z @ get("loading").mT + get("mean").unsqueeze(-2)
                pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            outer, inner = plates()
            loc = x @ get("weight").mT + get("bias").unsqueeze(-2)
            scale = get("log_scale").exp().unsqueeze(-2)
            with outer, inner:
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        return model, guide

    def gradients(self, objective: Any, copies: int, cost: int) -> tuple[Tensor, Tensor]:
        """Gradients of the loss for guide and model, `(copies, parameters)` each.

        Args:
            cost: numbers that one copy needs at each row, for the size of a chunk.
        """
        found: list[dict[str, Tensor]] = []
        for size in _chunks(copies, max(1, CHUNK // (ROWS * cost))):
            pyro.clear_param_store()
            model, guide = self.programs(size)
            objective.loss_and_grads(model, guide, self.x)
            leaves = pyro.get_param_store().named_parameters()
            found.append({name: leaf.grad.flatten(1) for name, leaf in leaves})
        guide_rows, model_rows = (
            torch.cat([torch.cat([chunk[name] for name in names], 1) for chunk in found])
            for names in (GUIDE, MODEL)
        )
        return guide_rows, model_rows


def _chunks(total: int, size: int) -> Iterator[int]:
    return (min(size, total - done) for done in range(0, total, size))


def make_vae(offset: float) -> VAE:
    """Data from the model, and parameters whose entries are off their optimum by N(0, offset)."""
    loading = torch.linalg.qr(randn(DATA, LATENT, seed=1).double()).Q * SIGNAL
    x = randn(ROWS, LATENT, seed=2) @ loading.T + NOISE * randn(ROWS, DATA, seed=3)
    precision = 1 / NOISE**2 * SIGNAL**2 + 1
    best = {
        "weight": loading.T / NOISE**2 / precision,
        "bias": torch.zeros(LATENT),
        "log_scale": torch.full((LATENT,), -0.5 * math.log(precision)),
        "loading": loading,
        "mean": torch.zeros(DATA),
    }
    return VAE(
        x, {n: v + offset * randn(*v.shape, seed=4 + i) for i, (n, v) in enumerate(best.items())}
    )


# Variances at one K.


def variances(vae: VAE, k: int, copies: int) -> dict[str, list[float]]:
    """For each gradient: sum of variances relative to reparam for ELBO, IWAE and Renyi 0.5, guide
    and model; and the largest |difference of means| in standard errors.
    """
    orders = (1.0, 0.0, 0.5)
    theirs = lambda a: Trace_ELBO(**PYRO) if a == 1 else RenyiELBO(alpha=a, **PYRO)  # noqa: E731
    ours = lambda name: lambda a: pvi.RenyiELBO(a, k, gradient=name)  # noqa: E731
    makers = {name: ours(name) for name in ("reparam", "path", "score")} | {"Pyro": theirs}
    rows: dict[str, list[float]] = {name: [] for name in makers}
    worst = dict.fromkeys(makers, 0.0)
    for alpha in orders:
        found = {n: vae.gradients(m(alpha), copies, k * k) for n, m in makers.items()}
        for name, parts in found.items():
            for part, base in zip(parts, found["reparam"], strict=True):
                rows[name].append(float(part.var(0).sum() / base.var(0).sum()))
                error = ((part.var(0) + base.var(0)) / copies).sqrt()
                z = float(((part.mean(0) - base.mean(0)).abs() / error).max())
                worst[name] = max(worst[name], z)
    return {name: [*values, worst[name]] for name, values in rows.items()}


# Signal-to-noise ratios over K.


def objectives(k: int) -> dict[str, Any]:
    """What can be evaluated at K particles; "path" comes first."""
    names = ["path", "reparam", *(["score"] if 2 <= k <= SCORE_LIMIT else [])]
    found: dict[str, Any] = {name: pvi.IWAE(k, gradient=name) for name in names}
    if k > 1:  # Pyro does not batch a single particle
        found["Pyro"] = RenyiELBO(alpha=0.0, **{**PYRO, "num_particles": k})
    return found


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sds `(1 + BOOTSTRAP, parameters)`: of the sample, then of resampled ones."""
    size = len(samples)
    counts = torch.distributions.Multinomial(size, torch.ones(size)).sample((BOOTSTRAP,))
    weights = torch.cat([torch.ones(1, size), counts]) / size
    centre = samples.mean(0)
    shift = weights @ (samples - centre)
    variance = weights @ (samples - centre) ** 2 - shift**2
    return centre + shift, variance.sqrt()


def snr(vae: VAE, copies: int) -> Curves:
    """The SNR of every gradient for encoder and model, over K."""
    curves: Curves = {(side, name): {} for side in ("encoder", "model") for name in LOOKS}
    for k in PARTICLES:
        means: list[Tensor] = []
        for name, objective in objectives(k).items():
            parts = vae.gradients(objective, copies, k * k if name == "score" else k)
            found = [moments(part) for part in parts]
            means = means or [mean for mean, _ in found]  # those of "path"
            for side, mean, (_, sd) in zip(("encoder", "model"), means, found, strict=True):
                curves[side, name][k] = (mean.abs() / sd).mean(1)
    return curves


def slope(curve: dict[int, Tensor]) -> tuple[float, float]:
    """Exponent of K in the SNR from `ASYMPTOTIC` on, and its bootstrap standard error."""
    tail = {k: values for k, values in curve.items() if k >= ASYMPTOTIC}
    x = torch.tensor([math.log(k) for k in tail], dtype=torch.float64)
    x = x - x.mean()
    slopes = x @ torch.stack([values.log() for values in tail.values()]) / x.square().sum()
    return float(slopes[0]), float(slopes[1:].std())


def value_se(values: Tensor) -> tuple[float, float]:
    return float(values[0]), float(values[1:].std())


def table(setting: str, curves: Curves) -> list[list[Any]]:
    """A row for each side and K, with every gradient's SNR and standard error."""
    rows: list[list[Any]] = []
    for side in ("encoder", "model"):
        for k in PARTICLES:
            cells = [curves[side, name].get(k) for name in LOOKS]
            pairs = [(None, None) if cell is None else value_se(cell) for cell in cells]
            rows.append([setting, side, k, *(number for pair in pairs for number in pair)])
    return rows


def panel(axes: Any, curves: Curves, side: str, theory: dict[str, float]) -> None:
    """One side's curves, with lines of the slopes that theory predicts for large K."""
    for name, (title, look) in LOOKS.items():
        curve = curves[side, name]
        centre, spread = zip(*map(value_se, curve.values()), strict=True)
        label = "{}: {:+.3f} ± {:.3f}".format(title, *slope(curve))
        axes.errorbar(list(curve), centre, spread, ms=5, lw=1.4, label=label, **look)
    for name, exponent in theory.items():
        last = float(curves[side, name][PARTICLES[-1]][0])
        line = [1.25 * last * (k / PARTICLES[-1]) ** exponent for k in PARTICLES]
        axes.plot(PARTICLES, line, color="grey", ls=":", lw=1.2)
        axes.annotate(f"$K^{{{'-' if exponent < 0 else ''}1/2}}$", (PARTICLES[4], 1.3 * line[4]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(PARTICLES[::3], [str(k) for k in PARTICLES[::3]])
    axes.set_xlabel("particles K")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, title=f"slope for K ≥ {ASYMPTOTIC}", title_fontsize=8)
    tidy(axes)


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Three panels: the encoder near and far from the optimum, and the model near it."""
    figure = new_figure(11.0, 4.0)
    left, middle, right = figure.subplots(1, 3)
    panel(left, curves["near"], "encoder", {"reparam": -0.5, "path": 0.5})
    panel(middle, curves["far"], "encoder", {})
    panel(right, curves["near"], "model", {"reparam": 0.5})
    left.set_ylabel("signal-to-noise ratio of IWAE's gradient")
    left.set_title("encoder, near its optimum", fontsize=10)
    middle.set_title("encoder, far from its optimum", fontsize=10)
    middle.set_ylim(0.1, 12)
    right.set_title("model, near its optimum", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def verdict(curves: dict[str, Curves]) -> None:
    for setting, found in curves.items():
        for side in ("encoder", "model"):
            shown = ["{} {:+.3f} +- {:.3f}".format(n, *slope(found[side, n])) for n in LOOKS]
            print(f"slope of the SNR in K >= {ASYMPTOTIC}, {setting}, {side}: {', '.join(shown)}")
    print("theory for large K: encoder reparam -0.5, path +0.5; model +0.5")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--copies", type=int, default=200, help="replicates of each gradient")
    arguments.add_argument("--figure", type=Path, default=FIGURE)
    options = arguments.parse_args()
    rows, curves = [], {}
    with isolated(seed=options.seed):
        for setting, offset in OFFSETS.items():
            vae = make_vae(offset)
            found = variances(vae, PYRO["num_particles"], 10 * options.copies)
            rows += [[setting, name, *row] for name, row in found.items()]
            curves[setting] = snr(vae, options.copies)
    bounds = [f"{b}, {s}" for b in ("ELBO", "IWAE", "Renyi 0.5") for s in ("guide", "model")]
    header = ["setting", "gradient", *bounds, "max |z| of means"]
    report("gradients", header, rows, options.results, more={"copies": options.copies})
    rows = [row for setting, found in curves.items() for row in table(setting, found)]
    header = ["setting", "side", "K", *(f"{name}{x}" for name in LOOKS for x in ("", " se"))]
    report("gradients", header, rows, options.results, key="snr")
    rows = [
        [setting, *key, *slope(curve)]
        for setting, found in curves.items()
        for key, curve in found.items()
    ]
    header = ["setting", "side", "gradient", "slope", "se"]
    report("gradients", header, rows, options.results, key="slopes")
    verdict(curves)
    draw(curves, options.figure)


if __name__ == "__main__":
    main()
