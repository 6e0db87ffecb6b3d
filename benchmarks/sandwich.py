"""Log evidence from below and above, beside the exact value: importance sampling and AIS.

Linear regression (global weights, data sets of 20 rows) and a linear two-layer VAE (local latents,
500 rows), on data simulated from the model. Guides are amortised: near the posterior, or poor (two
sds off and half as wide). Bounds are for one data set, in nats; errors are differences from the
exact value on the same data, with standard errors over data sets or rows.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import parser, report, timed
from pvi.diagnostics.evidence import Options
from pvi.diagnostics.sandwich import bounds
from pvi.diagnostics.weights import make_target
from pvi.engine.simulate import Simulated, simulate
from pvi.figures import new_figure, tidy
from tests.linear import regression, regression_guide, regression_log_z, vae, vae_guide, vae_log_z
from tests.scenarios import isolated

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "sandwich.png"
SIMULATIONS = {"regression": 20, "VAE": 1}
SETTINGS = {
    **{f"IS, {n:,} draws": {"method": "is", "num_samples": n} for n in (100, 1000, 10_000)},
    **{
        f"AIS, 16 chains, {n} steps": {"method": "ais", "num_chains": 16, "num_steps": n}
        for n in (10, 50, 250)
    },
}
POOR = {"shift": 2.0, "width": 0.5}
MODELS: dict[str, tuple[Callable, Callable, tuple[int, ...], Callable]] = {
    "regression": (regression, regression_guide, (20,), regression_log_z),
    "VAE": (vae, vae_guide, (500, 4), vae_log_z),
}
HEADER = [
    "model",
    "guide",
    "method",
    "lower",
    "exact",
    "upper",
    "lower - exact",
    "se",
    "upper - exact",
    "se ",
    "s",
]


def simulations(name: str) -> list[Simulated]:
    model, _, shape, _ = MODELS[name]
    return [simulate(model, (torch.zeros(shape),), {}) for _ in range(SIMULATIONS[name])]


def measure(
    name: str, guide: Callable, sets: list[Simulated], options: Options
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Lower bounds, exact values and upper bounds, `(simulations, *plates)`; seconds a data set."""
    found: list[tuple[Tensor, ...]] = []
    with timed() as seconds:
        for made in sets:
            target = make_target(made.model, guide, made.args, made.kwargs)
            lower, upper = bounds(target, made, options)
            found.append((lower, MODELS[name][3](made.args[0]), upper))
    lower, exact, upper = map(torch.stack, zip(*found, strict=True))
    return lower, exact, upper, seconds[0] / len(sets)


def mean_se(x: Tensor) -> list[float]:
    """Mean over data sets of the sum over data, and its standard error."""
    count, values = len(x), x.flatten()
    return [float(values.sum()) / count, float(values.std()) * len(values) ** 0.5 / count]


def plot(rows: list[list[Any]], path: Path) -> None:
    """Errors of both bounds against time, with the poor guides: near ones leave only noise."""
    panels = [(name, "poor") for name in MODELS]
    figure = new_figure(8, 3.3)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for color, method in (("tab:blue", "IS"), ("tab:orange", "AIS")):
            chosen = [r for r in rows if (*r[:2],) == panel and r[2].startswith(method + ",")]
            for column, style in ((6, "v-"), (8, "^--")):
                errors, se = [r[column] for r in chosen], [r[column + 1] for r in chosen]
                label = f"{method}, {'lower' if column == 6 else 'upper'}"
                times = [r[10] for r in chosen]
                axes.errorbar(times, errors, se, fmt=style, color=color, label=label)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(f"{panel[0]}, poor guide", fontsize=10)
        axes.set(xlabel="seconds per data set", xscale="log")
        axes.set_yscale("symlog", linthresh=1)
        axes.margins(y=0.1)
        tidy(axes)
    figure.axes[0].set_ylabel("bound - exact (nats per data set)")
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--figure", type=Path, default=FIGURE)
    options = arguments.parse_args()
    rows: list[list[Any]] = []
    with isolated(seed=options.seed), torch.no_grad():
        for name, (_, guide, *_) in MODELS.items():
            sets = simulations(name)
            for quality, program in (("near", guide), ("poor", partial(guide, **POOR))):
                for how, setting in SETTINGS.items():
                    checked = Options(progress=False, **setting)
                    *found, seconds = measure(name, program, sets, checked)
                    lower, exact, upper = found
                    errors = [*mean_se(lower - exact), *mean_se(upper - exact)]
                    values = [mean_se(x)[0] for x in found]
                    rows.append([name, quality, how, *values, *errors, seconds])
    report("sandwich", HEADER, rows, options.results, more={"simulations": SIMULATIONS})
    plot(rows, options.figure)


if __name__ == "__main__":
    main()
