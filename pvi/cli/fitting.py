"""The work of `pvi fit`: a user's program and data in; draws, pictures and a page out."""

import time
from pathlib import Path
from typing import Any

import torch

import pvi
from pvi.cli.output import (
    forests,
    heading,
    indented,
    predictive_check,
    save_draws,
    save_picture,
    small_sites,
    summary,
)
from pvi.cli.program import load_data, load_program, make_guide, make_objective
from pvi.fit.plot import plot_bound
from pvi.page import Section

MAX_NUMBERS, MIN_DRAWS = 20_000_000, 10  # in the netCDF file


def run(
    spec: str,
    data: Path,
    out: Path,
    *,
    guide: str,
    objective: str,
    draws: int,
    seed: int,
    **options: Any,
) -> Section:
    """Fit, check, save and draw; `options` go to `pvi.fit`."""
    model, family, columns = _loaded(spec, data, guide, seed)
    chosen = make_objective(objective) if objective else None
    out.mkdir(parents=True, exist_ok=True)

    heading(f"{spec}, {guide}")
    start = time.perf_counter()
    fitted = pvi.fit(model, family, columns, objective=chosen, seed=seed, **options)
    about = f"{fitted}, {time.perf_counter() - start:.0f} s"
    print(about, flush=True)
    diagnosis = fitted.diagnose(seed=seed)
    print(f"{indented(diagnosis)}\n", flush=True)
    idata = _draws(fitted, draws, seed)
    save_draws(idata, out / "posterior.nc")
    text = _summary(idata)
    print(indented(text), flush=True)
    figures = [save_picture(plot_bound(fitted.history), out / "bound.png", "Bound, nats")]
    names, _ = small_sites(idata)
    figures += forests(idata, names, out) if names else []
    figures += predictive_check(idata, out / "ppc.png")
    blocks = (("Diagnosis", str(diagnosis)), ("Summary", text))
    return Section(spec, f"{about}.", diagnosis.verdict, blocks, tuple(figures))


def check(spec: str, data: Path, guide: str, objective: str, batch_size: int | None) -> pvi.Check:
    """What `pvi.check` says of a user's program and file."""
    model, family, columns = _loaded(spec, data, guide, 0)
    chosen = make_objective(objective) if objective else None
    return pvi.check(model, family, columns, objective=chosen, batch_size=batch_size)


def _loaded(spec: str, data: Path, guide: str, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Model, guide and columns from the words of the command line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a file may make networks when it is read
        model = load_program(spec)
        family = make_guide(guide, model, spec)
    columns, unused = load_data(data, model)
    if unused:
        print(f"columns not used: {', '.join(unused)}")
    return model, family, columns


def _draws(fitted: pvi.Fit, num_draws: int, seed: int) -> Any:
    """The posterior in arviz's form, with fewer draws where each of them is large."""
    runner = fitted.posterior.runner
    sizes = {name: node["value"].numel() for name, node in runner.nodes.items()}
    size = sum(sizes.values()) + sum(sizes[name] for name in runner.observed)  # predicted as well
    count = min(num_draws, max(MAX_NUMBERS // size, MIN_DRAWS))
    if count < num_draws:
        print(f"posterior.nc holds {count:,} draws only, as each has {size:,} numbers\n")
    return fitted.to_arviz(count, seed=seed)


def _summary(idata: Any) -> str:
    names, large = small_sites(idata)
    lines = [summary(idata, names)] if names else []
    lines += [f"(not listed, for their size: {', '.join(large)})"] if large else []
    return "\n".join(lines)
