"""The command `pvi`: variational inference on Pyro programs, with a verdict on each result."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pvi.errors import PviError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
Out = Annotated[Path, typer.Option(help="Where results go.")]
Seed = Annotated[int, typer.Option(help="Makes the run repeatable.")]


@app.command()
def demo(
    out: Out = Path("pvi-demo"),
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that it runs.")] = False,
) -> None:
    """Fit and check a robust regression and a small VAE on real data."""
    with _clear_errors():
        from pvi.cli import digits, regression
        from pvi.cli.output import one_thread
        from pvi.page import write_page
        from pvi.plots import check_matplotlib

        check_matplotlib()
        out.mkdir(parents=True, exist_ok=True)
        sections, times = [], []
        with one_thread():
            for part in (regression, digits):
                start = time.perf_counter()
                sections += part.run(out, seed=seed, quick=quick)
                times.append(f"{time.perf_counter() - start:.0f} s")
        lead = "Two ordinary Pyro programs, fitted and checked by a call each."
        write_page(out / "index.html", "pvi demo", lead, sections)
        verdicts = {s.title: s.verdict for s in sections if s.verdict}
        _say_end(out, verdicts, times=f"{times[0]} and {times[1]}")


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Your Pyro program, as FILE.py:NAME.")],
    data: Annotated[Path, typer.Option(help="A .csv, .npz or .parquet file; columns by name.")],
    guide: Annotated[
        str,
        typer.Option(help="Of pvi or Pyro, a name in the model's file, or FILE.py:NAME."),
    ] = "MeanField",
    objective: Annotated[
        str, typer.Option(help="Such as ELBO, IWAE:8, RenyiELBO:0.5:8, BetaELBO:4.")
    ] = "",
    steps: Annotated[int | None, typer.Option(help="Default: until the bound is level.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a minibatch.")] = None,
    lr: Annotated[float | None, typer.Option(help="First learning rate.")] = None,
    draws: Annotated[int, typer.Option(min=2, help="Draws to save.")] = 1000,
    seed: Seed = 0,
    out: Out = Path("pvi-fit"),
) -> None:
    """Fit your own Pyro program to a file of data, whose columns are its arguments by name."""
    with _clear_errors():
        from pvi.cli import fitting
        from pvi.plots import check_matplotlib

        check_matplotlib()
        verdict = fitting.run(
            model,
            data,
            out,
            guide=guide,
            objective=objective,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            draws=draws,
            seed=seed,
        )
        _say_end(out, {model: verdict})


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="What Fit.save wrote, or --out of `pvi fit`.")],
    model: Annotated[str, typer.Option(help="The Pyro program of that fit, as FILE.py:NAME.")],
    data: Annotated[Path | None, typer.Option(help="Its data: .csv, .npz or .parquet.")] = None,
    guide: Annotated[str, typer.Option(help="Its guide, as in `pvi fit`.")] = "MeanField",
    draws: Annotated[int, typer.Option(min=2, help="Draws that are judged.")] = 20_000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write a page on a saved fit: whether its posterior may be trusted, and what it says."""
    with _clear_errors():
        from pvi.cli import fitting

        verdict = fitting.report(run_dir, model, data, out, guide=guide, draws=draws, seed=seed)
        print(f"\nVerdict\n  {verdict}\n\nOpen {out} in a browser.")


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Your Pyro program, as FILE.py:NAME.")],
    data: Annotated[Path, typer.Option(help="A .csv, .npz or .parquet file; columns by name.")],
    guide: Annotated[
        str,
        typer.Option(help="Of pvi or Pyro, a name in the model's file, or FILE.py:NAME."),
    ] = "MeanField",
    objective: Annotated[str, typer.Option(help="As in `pvi fit`.")] = "",
    batch_size: Annotated[int | None, typer.Option(help="Rows in a minibatch.")] = None,
) -> None:
    """Look at a program and its data as `pvi fit` does before its first step, and fit nothing."""
    with _clear_errors():
        from pvi.cli import fitting

        found = fitting.check(model, data, guide, objective, batch_size)
        print(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def vae(
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, mnist, or a path (.npz, folder of .gz).")
    ] = "digits",
    model: Annotated[
        str,
        typer.Option(help="vae, conv, ladder, vq, diffusion, autoregressive or flow."),
    ] = "vae",
    likelihood: Annotated[
        str,
        typer.Option(help="bernoulli, continuous-bernoulli, gaussian, laplace or levels."),
    ] = "bernoulli",
    prior: Annotated[str, typer.Option(help="standard, mixture, vamp or flow.")] = "standard",
    objective: Annotated[str, typer.Option(help="As in `pvi fit`; the model's by default.")] = "",
    latents: Annotated[int, typer.Option(min=1, help="Numbers for each image.")] = 20,
    levels: Annotated[int, typer.Option(min=2, help="Grey values, for --likelihood levels.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a minibatch.")] = 100,
    samples: Annotated[
        int, typer.Option(min=0, help="Importance samples of an image's evidence; 0 for none.")
    ] = 1000,
    seed: Seed = 0,
    out: Out = Path("pvi-vae"),
) -> None:
    """Fit a model of the VAE family to images, evaluate it on held-out ones and draw."""
    with _clear_errors():
        from pvi.cli import images
        from pvi.plots import check_matplotlib

        check_matplotlib()
        out.mkdir(parents=True, exist_ok=True)
        end = images.run(
            out,
            data=data,
            model=model,
            likelihood=likelihood,
            prior=prior,
            objective=objective,
            latents=latents,
            levels=levels,
            epochs=epochs,
            batch_size=batch_size,
            samples=samples,
            seed=seed,
        )
        _say_end(out, {f"{model}, {data}": end})


@app.command()
def topics(
    corpus: Annotated[
        str, typer.Argument(help="A .csv, .jsonl or .npz file, or reuters (package lda).")
    ],
    model: Annotated[
        str, typer.Option(help="prodlda, lda, etm, supervised or dynamic.")
    ] = "prodlda",
    k: Annotated[int, typer.Option("-k", "--topics", min=2, help="Number of topics.")] = 20,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the documents; the model's by default.")
    ] = None,
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[str | None, typer.Option(help="Column of labels [label, if there].")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times [time, if there].")] = None,
    min_df: Annotated[int, typer.Option(min=1, help="Documents that a word must be in.")] = 5,
    max_df: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of documents it may be in.")
    ] = 0.5,
    max_words: Annotated[int | None, typer.Option(min=2, help="Keep the most frequent.")] = None,
    stop_words: Annotated[str, typer.Option(help="english or none.")] = "english",
    test_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Documents to hold out.")
    ] = 0.1,
    seed: Seed = 0,
    out: Out = Path("pvi-topics"),
) -> None:
    """Fit a topic model to a corpus, evaluate it, and write tables, pictures and a page."""
    with _clear_errors():
        from pvi.cli import documents
        from pvi.plots import check_matplotlib

        check_matplotlib()
        out.mkdir(parents=True, exist_ok=True)
        reading = {"text": text, "label": label, "time": time, "test_share": test_share}
        reading |= {"min_df": min_df, "max_df": max_df, "max_features": max_words}
        reading["stop_words"] = None if stop_words == "none" else stop_words
        options = {"model": model, "k": k, "epochs": epochs, "seed": seed}
        end = documents.run(corpus, out, **options, reading=reading)
        _say_end(out, {f"{model}, {corpus}": end})


def _say_end(out: Path, verdicts: dict[str, str], times: str = "") -> None:
    """The last lines: verdicts, and where the files are."""
    print("\nVerdicts" if len(verdicts) > 1 else "\nVerdict")
    width = max(map(len, verdicts))
    for title, verdict in verdicts.items():
        print(f"  {title.ljust(width)}  {verdict}")
    if times:
        print(f"\nTook: {times}")
    print(f"\nIn {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    print(f"Open {out / 'index.html'} in a browser.")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Print what is wrong with the input in one message, without a traceback."""
    from pvi.cli.program import UsageError

    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files: open no windows
    try:
        yield
    except UsageError as error:
        print(f"pvi: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except PviError as error:
        print(f"pvi: {type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
