"""The examples that make pictures: they run, on whichever arviz is there, and draw something."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from pvi.posterior.arviz import load

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.usefixtures("isolated")
def test_arviz_gallery(tmp_path: Path, capsys: Any) -> None:
    image = pytest.importorskip("matplotlib.image")
    gallery = runpy.run_path(str(EXAMPLES / "arviz_gallery.py"))
    gallery["main"](tmp_path, num_sims=10)
    names = {"forest", "posterior", "ridge", "pair", "ppc"}
    if not load().__version__.startswith("0."):
        names.add("ecdf_pit")
    pictures = {path.stem.removeprefix("arviz_"): path for path in tmp_path.iterdir()}
    assert set(pictures) == names
    for name, path in pictures.items():
        pixels = image.imread(path)[..., :3]
        ink = (pixels.min(-1) < 0.9).mean()
        assert 0.005 < ink < 0.8, name
    table = capsys.readouterr().out
    assert "theta[Hermon]" in table


@pytest.mark.parametrize(
    ("name", "picture", "says"),
    [
        ("vae_images", True, "log evidence of a held-out image"),
        ("vae_objectives", False, "beta from 0 to 1"),
        ("vae_diffusion", True, "diffusion of latents of a VAE: ELBO"),
    ],
)
@pytest.mark.filterwarnings("ignore:training ended after:UserWarning")
def test_vae(
    name: str, picture: bool, says: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    pytest.importorskip("sklearn")
    words = [name, "--epochs", "1"] + (["--out", str(tmp_path / "a.png")] if picture else [])
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert says in capsys.readouterr().out
    assert (tmp_path / "a.png").exists() == picture


FAST = ("conditional", "made", "vq_vae")
SLOW = ("vae", "beta_vae", "iwae", "factor", "semi_supervised", "ladder", "hierarchical")
SLOW += ("kl_autoencoder", "diffusion", "pixel_cnn", "flow", "gan")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
@pytest.mark.filterwarnings("ignore:training ended after:UserWarning")
def test_vae_gallery(name: str, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    pytest.importorskip("sklearn")
    gallery = runpy.run_path(str(EXAMPLES / "vae_gallery.py"))
    assert set(gallery["MODELS"]) == {*FAST, *SLOW}
    gallery["draw"](name, gallery["task"]("digits", 1), tmp_path)
    pixels = image.imread(tmp_path / f"gallery_{name}.png")[..., :3]
    assert 0.05 < (pixels.min(-1) < 0.9).mean() < 0.98
