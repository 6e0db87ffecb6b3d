"""The command `pvi`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pvi.errors import PviError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("pvi-demo"),
    seed: Annotated[int, typer.Option(help="Makes the run repeatable.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that it runs.")] = False,
) -> None:
    """Fit and check a robust regression and a small VAE on real data."""
    with _clear_errors():
        from pvi.cli import digits, regression
        from pvi.report import write_report

        out.mkdir(parents=True, exist_ok=True)
        sections, times = [], []
        for part in (regression, digits):
            start = time.perf_counter()
            sections.append(part.run(out, seed=seed, quick=quick))
            times.append(time.perf_counter() - start)
        lead = "Two Pyro programs, fitted and checked by one call each."
        write_report(out / "index.html", "pvi demo", lead, sections)
        print("\nVerdicts")
        for section, seconds in zip(sections, times, strict=True):
            print(f"  {section.title}: {section.verdict} ({seconds:.0f} s)")
        _say_files(out)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Your Pyro program, as FILE.py:NAME.")],
    data: Annotated[Path, typer.Option(help="A .csv, .npz or .parquet file; columns by name.")],
    guide: Annotated[str, typer.Option(help="A guide's name, or FILE.py:NAME.")] = "MeanField",
    objective: Annotated[str, typer.Option(help="Such as ELBO, IWAE:8, BetaELBO:4.")] = "",
    steps: Annotated[int | None, typer.Option(help="Default: until the bound is level.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a minibatch.")] = None,
    lr: Annotated[float | None, typer.Option(help="First learning rate.")] = None,
    draws: Annotated[int, typer.Option(help="Draws to save.")] = 1000,
    seed: Annotated[int, typer.Option(help="Makes the run repeatable.")] = 0,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("pvi-fit"),
) -> None:
    """Fit your own Pyro program to a file of data."""
    with _clear_errors():
        import pvi
        from pvi.cli.output import heading, write
        from pvi.cli.program import load_data, load_program, make_guide, make_objective
        from pvi.report import write_report

        program = load_program(model)
        columns, unused = load_data(data, program)
        if unused:
            print(f"columns not used: {', '.join(unused)}")
        fitted = pvi.fit(
            program,
            make_guide(guide, program),
            columns,
            objective=make_objective(objective) if objective else None,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
        )
        heading(f"{model}, {guide}")
        print(fitted)
        diagnosis = fitted.diagnose(seed=seed)
        print(f"{diagnosis}\n")
        out.mkdir(parents=True, exist_ok=True)
        idata = fitted.to_arviz(draws, seed=seed)
        section = write(fitted, diagnosis, idata, out, title=model, text=repr(fitted))
        write_report(out / "index.html", f"pvi fit {model}", f"Data: {data.name}", [section])
        _say_files(out)


def _say_files(out: Path) -> None:
    print(f"\nIn {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    print(f"Open {out / 'index.html'} in a browser.")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Print what is wrong with the input in one message, without a traceback."""
    from pvi.cli.program import UsageError

    try:
        yield
    except UsageError as error:
        print(f"pvi: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except PviError as error:
        print(f"pvi: {type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
