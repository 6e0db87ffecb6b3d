"""The work of `pvi fit`: a user's program and data in; draws, pictures and a page out."""

import re
import time
from pathlib import Path
from typing import Any

import torch

import pvi
from pvi.cli.output import heading, indented, save_draws, small_sites, summary
from pvi.cli.program import UsageError, load_data, load_program, make_guide, make_objective
from pvi.fit.report import make_report
from pvi.fit.storage import STATE

FIT = "fit"  # where a fit is kept in the folder of its results
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
) -> str:
    """Fit, check, save and draw; `options` go to `pvi.fit`. Returns the verdict."""
    model, family, columns = _loaded(spec, data, guide, seed)
    chosen = make_objective(objective) if objective else None
    out.mkdir(parents=True, exist_ok=True)

    heading(f"{spec}, {guide}")
    start = time.perf_counter()
    fitted = pvi.fit(model, family, columns, objective=chosen, seed=seed, **options)
    print(f"{fitted}, {time.perf_counter() - start:.0f} s", flush=True)
    fitted.save(out / FIT)
    report = make_report(fitted, seed=seed, title=_title(spec, guide))
    print(f"{indented(report.diagnosis)}\n", flush=True)
    idata = _draws(fitted, draws, seed)
    save_draws(idata, out / "posterior.nc")
    print(indented(_summary(idata)), flush=True)
    for picture in report.pictures:
        picture.save(out)
    report.write(out / "index.html")
    return report.diagnosis.verdict


def report(
    folder: Path, spec: str, data: Path | None, out: Path, *, guide: str, draws: int, seed: int
) -> str:
    """The page of a fit that was saved, and its verdict."""
    if (folder / FIT).is_dir():
        folder = folder / FIT
    if not (folder / STATE).is_file():
        raise UsageError(
            f"there is no saved fit in {folder}: expected the folder that Fit.save wrote, or that "
            "of --out of pvi fit"
        )
    model, family, columns = _loaded(spec, data, guide, seed)
    fitted = pvi.load(folder, model, family, columns)
    found = make_report(fitted, draws, seed=seed, title=_title(spec, guide))
    print(f"{fitted}\n{indented(found.diagnosis)}", flush=True)
    found.write(out)
    return found.diagnosis.verdict


def _title(spec: str, guide: str) -> str:
    """The words of the command line without folders."""
    return ", ".join(re.sub(r"^.*[/\\](?=[^:])", "", word) for word in (spec, guide))


def check(spec: str, data: Path, guide: str, objective: str, batch_size: int | None) -> pvi.Check:
    """What `pvi.check` says of a user's program and file."""
    model, family, columns = _loaded(spec, data, guide, 0)
    chosen = make_objective(objective) if objective else None
    return pvi.check(model, family, columns, objective=chosen, batch_size=batch_size)


def _loaded(spec: str, data: Path | None, guide: str, seed: int) -> tuple[Any, Any, Any]:
    """Model, guide and columns from the words of the command line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a file may make networks when it is read
        model = load_program(spec)
        family = make_guide(guide, model, spec)
    columns, unused = ((), []) if data is None else load_data(data, model)
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
