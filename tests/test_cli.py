"""The commands leave what they promise, and say in one message what is wrong with their input."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pvi.cli import app, fitting
from pvi.cli.program import make_objective
from pvi.models import vae

MODEL = """
import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
import torch

def line(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)

class Lines(torch.nn.Module):
    def model(self, x, y=None):
        line(x, y)

lines = Lines()
number = 3

def point(x, y=None):
    pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.0)), 0.1))
    pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), 0.1))
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model and a table with one column too many: y = 1 + 2 x + noise."""
    (tmp_path / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = 1 + 2 * x + 0.5 * rng.normal(size=60)
    rows = "\n".join(f"{a},{b},spam" for a, b in zip(x, y, strict=True))
    (tmp_path / "table.csv").write_text(f"x,y,note\n{rows}\n")
    np.savez(tmp_path / "table.npz", x=x, y=y)
    return tmp_path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def fit(files: Path, *words: object, model: str = "line", data: str = "table.csv") -> Result:
    return run("fit", f"{files}/model.py:{model}", "--data", files / data, *words)


def test_demo(tmp_path: Path) -> None:
    result = run("demo", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert {"index.html", "posterior.nc", "bound.png", "forest.png", "ppc.png"} <= names
    assert {"vae-posterior.nc", "vae-images.png", "vae-bound.png"} <= names
    verdicts = result.output.split("\nVerdicts\n")[1]
    for part in ("independent normals", "correlated normals"):
        assert re.search(rf"diabetes data: {part} +(good|correctable|unreliable)\n", verdicts)
    assert re.search(r"VAE, digits +unreliable\n", verdicts)  # 3 epochs do not train it
    assert verdicts.endswith(f"Open {tmp_path / 'index.html'} in a browser.\n")
    assert "beta[bmi]" in result.output  # arviz's summary, with names
    page = (tmp_path / "index.html").read_text()
    assert "VAE, digits" in page and "data:image/png;base64," in page


@pytest.mark.parametrize("data", ["table.csv", pytest.param("table.npz", marks=pytest.mark.slow)])
def test_fit_finds_the_line(files: Path, data: str) -> None:
    import arviz

    out = files / "out"
    result = fit(files, "--steps", 300, "--out", out, "--draws", 300, data=data)
    assert result.exit_code == 0, result.output
    assert ("columns not used: note" in result.output) == (data == "table.csv")
    posterior = arviz.from_netcdf(out / "posterior.nc")["posterior"]
    # the posterior sd is 0.5 / sqrt(60) = 0.065
    assert float(posterior["a"].mean()) == pytest.approx(1.0, abs=0.25)
    assert float(posterior["b"].mean()) == pytest.approx(2.0, abs=0.25)
    assert {p.name for p in out.iterdir()} >= {"index.html", "bound.png", "forest.png", "ppc.png"}


@pytest.mark.parametrize(
    "words",
    [
        ("--guide", "AutoMultivariateNormal"),
        ("--guide", "{files}/model.py:point"),
        ("--guide", "{files}/model.py:AutoNormal"),
        ("--guide", "point"),
        ("--objective", "ELBO:4"),
        ("--batch-size", "20", "--lr", "0.02"),
    ],
)
def test_options(files: Path, words: tuple[str, ...]) -> None:
    words = tuple(word.format(files=files) for word in words)
    result = fit(files, "--steps", 20, "--draws", 20, "--out", files / "out", *words)
    assert result.exit_code == 0, result.output


def test_a_method_is_a_model(files: Path) -> None:
    words = ("--steps", 20, "--draws", 20, "--out", files / "out")
    result = fit(files, *words, model="lines.model", data="table.npz")
    assert result.exit_code == 0, result.output


def test_a_large_posterior_has_fewer_draws(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import arviz

    monkeypatch.setattr(fitting, "MAX_NUMBERS", 122 * 30)  # a, b, and y twice, in 30 draws
    result = fit(files, "--steps", 20, "--out", files / "out")
    assert "posterior.nc holds 30 draws only, as each has 122 numbers" in result.output
    assert arviz.from_netcdf(files / "out" / "posterior.nc")["posterior"].sizes["draw"] == 30


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{files}/model.py:number", "--data", "{files}/table.csv"), 2, "'number' in"),
        (("{files}/model.py:lines.no", "--data", "{files}/table.csv"), 2, "no 'lines.no'"),
        (("{files}/broken.py:line", "--data", "{files}/table.csv"), 2, "SyntaxError"),
        (("{files}/lonely.py:line", "--data", "{files}/table.csv"), 2, "No module named 'nosuch'"),
        (
            ("{files}/model.py:line", "--data", "{files}/text.csv"),
            2,
            "column 'x' of text.csv holds",
        ),
        (
            ("{files}/model.py:line", "--data", "{files}/table.csv", "--objective", "IWAE:0"),
            1,
            "ObjectiveError: num_particles",
        ),
        (("{files}/model.py", "--data", "{files}/table.csv"), 2, "FILE.py:NAME"),
        (("{files}/no.py:line", "--data", "{files}/table.csv"), 2, "there is no file"),
        (("{files}/model.py:lime", "--data", "{files}/table.csv"), 2, "no 'lime'; it has"),
        (("{files}/model.py:line", "--data", "{files}/no.csv"), 2, "there is no data file"),
        (("{files}/model.py:line", "--data", "{files}/model.py"), 2, ".csv, .npz or .parquet"),
        (
            ("{files}/model.py:line", "--data", "{files}/table.csv", "--guide", "Magic"),
            2,
            "no guide 'Magic'; there are Auto",
        ),
        (
            ("{files}/model.py:line", "--data", "{files}/table.csv", "--objective", "IWAE"),
            2,
            "IWAE:K",
        ),
        (
            ("{files}/model.py:line", "--data", "{files}/table.csv", "--steps", "0"),
            1,
            "steps must be a whole number",
        ),
        (("{files}/model.py:line", "--data", "{files}/other.csv"), 2, "'x' has no column"),
        (("{files}/model.py:line", "--data", "{files}/nan.csv", "--steps", "5"), 1, "'y' has NaN"),
    ],
)
def test_errors(files: Path, words: tuple[str, ...], code: int, message: str) -> None:
    (files / "other.csv").write_text("u,y\n1,2\n")
    (files / "text.csv").write_text("x,y\none,2\ntwo,3\n")
    (files / "broken.py").write_text("def line(:")
    (files / "lonely.py").write_text("import nosuch")
    (files / "nan.csv").write_text("x,y\n1,2\n2,\n3,1\n")
    result = run("fit", *(word.format(files=files) for word in words))
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "alpha", "particles", "beta"),
    [
        ("ELBO", 1.0, 1, 1.0),
        ("IWAE:8", 0.0, 8, 1.0),
        ("RenyiELBO:0.5:3", 0.5, 3, 1.0),
        ("BetaELBO:4", 1.0, 1, 4.0),
        ("TraceMeanFieldELBO:2", 1.0, 2, 1.0),
    ],
)
def test_objectives(words: str, alpha: float, particles: int, beta: float) -> None:
    objective = make_objective(words)
    assert (objective.alpha, objective.num_particles, objective.beta) == (alpha, particles, beta)


def test_check(files: Path) -> None:
    """The table, and nothing else: no fit, no files; problems end it with an error's status."""
    words = ("check", f"{files}/model.py:line", "--data", files / "table.csv")
    before = sorted(files.iterdir())
    good = run(*words, "--batch-size", 10)
    assert good.exit_code == 0, good.output
    assert "pvi.check: no problems" in good.output
    assert re.search(r"^a +latent +Normal", good.output, re.MULTILINE)
    assert "batches of 10 of 60 rows, which plate 'row' follows" in good.output
    assert "columns not used: note" in good.output
    assert sorted(files.iterdir()) == before
    bad = run(*words, "--batch-size", 0)
    assert bad.exit_code == 1
    assert "1 problem" in bad.output and "batch_size must be a whole number >= 1" in bad.output


def test_report_of_a_saved_fit(files: Path) -> None:
    """The page that `pvi fit` wrote, again from what it has saved."""
    words = ("--model", f"{files}/model.py:line", "--data", files / "table.csv")
    assert fit(files, "--steps", 20, "--draws", 20, "--out", files / "out").exit_code == 0
    page = files / "again.html"
    result = run("report", files / "out", *words, "--out", page)
    assert result.exit_code == 0, result.output
    text, first = page.read_text(), (files / "out" / "index.html").read_text()
    assert text == first
    assert str(files) not in text
    wrong = run("report", files, *words, "--out", page)
    assert wrong.exit_code == 2
    assert "there is no saved fit in" in wrong.output
    other = run("report", files / "out", *words, "--guide", "FullRank", "--out", page)
    assert other.exit_code == 1
    assert "CheckpointError" in other.output and "Traceback" not in other.output


@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [
        ("vae", ["--prior", "vamp", "--objective", "IWAE:3"], {"traversals.png", "latents.png"}),
        ("conv", ["--likelihood", "levels", "--levels", 17], {"interpolations.png"}),
        ("ladder", ["--prior", "mixture"], {"reconstructions.png", "latents.png"}),
        ("vq", [], {"reconstructions.png", "samples.png"}),
        ("diffusion", [], {"reconstructions.png", "samples.png"}),
        ("autoregressive", [], {"samples.png"}),
        ("flow", [], {"samples.png"}),
    ],
)
def test_vae(
    model: str, more: list, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = partial(vae.DiffusionVAE, steps=20)
    monkeypatch.setattr(vae, "DiffusionVAE", short)
    x = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x_train=x[:30], x_test=x[30:])
    out = tmp_path / "out"
    options = ["--model", model, *more, "--latents", 4, "--epochs", 2, "--samples", 5]
    options += ["--batch-size", 10, "--data", tmp_path / "images.npz", "--out", out]
    result = run("vae", *options)
    assert result.exit_code == 0, result.output
    assert {"index.html", "bound.png", "model"} | expected <= {p.name for p in out.iterdir()}
    assert "ELBO" in result.output and "beta = 1" in result.output
    assert ("log evidence" in result.output) == (model in ("vae", "conv", "ladder"))


def test_vae_refuses_unknown_words(tmp_path: Path) -> None:
    result = run("vae", "--likelihood", "normal", "--out", tmp_path)
    assert result.exit_code == 2 and "expected one of bernoulli" in result.output
    result = run("vae", "--data", "cifar", "--out", tmp_path)
    assert result.exit_code == 1 and "fashion-mnist or a path" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vq", "--prior", "flow"], "vq has no such prior"),
        (["--model", "diffusion", "--likelihood", "continuous-bernoulli"], "bernoulli, gaussian"),
        (["--model", "flow", "--likelihood", "laplace"], "bernoulli, gaussian, levels"),
    ],
)
def test_vae_refuses_what_it_would_not_use(words: list, message: str, tmp_path: Path) -> None:
    result = run("vae", *words, "--out", tmp_path)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
