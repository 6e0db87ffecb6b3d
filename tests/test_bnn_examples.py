"""The examples of Bayesian networks: they run and draw something."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "pictures", "says"),
    [
        ("bnn_uci", ["bnn_uci.png"], "inside of two sds"),
        ("bnn_mnist", ["bnn_reliability.png", "bnn_entropy.png"], "AUROC of unknown images"),
    ],
)
def test_runs(
    name: str, pictures: list[str], says: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / ("bnn_uci.png" if name == "bnn_uci" else "bnn")
    monkeypatch.setattr(sys, "argv", [name, "--steps", "20", "--out", str(out)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    text = capsys.readouterr().out
    assert says in text and "chosen on" in text
    for picture in pictures:
        pixels = image.imread(tmp_path / picture)[..., :3]
        assert 0.005 < (pixels.min(-1) < 0.9).mean() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("bnn_gap", "--steps"), ("bnn_continual", "--epochs")])
def test_short_runs(name: str, count: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [name, count, "2", "--out", str(out)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert str(out) in capsys.readouterr().out
    assert 0.005 < (image.imread(out)[..., :3].min(-1) < 0.9).mean() < 0.8
