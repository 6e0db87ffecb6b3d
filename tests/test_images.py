"""Images by name and from files, and binarised afresh."""

import gzip
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pvi
from pvi.datasets import Binarized, images
from pvi.errors import DataError
from pvi.models.vae import VAE


def test_digits() -> None:
    found = images()
    assert found.train.shape == (1500, 1, 8, 8) and found.test.shape == (297, 1, 8, 8)
    assert found.labels is not None and found.labels.shape == (1500,)
    assert found.train.dtype == torch.float32 and float(found.train.max()) == 1.0
    assert not (found.train[:, None] == found.test[:20]).flatten(2).all(-1).any()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).integers(0, 256, (7, 3, 4)).astype(np.uint8)
    x[0, 0, 0] = 255
    return {"x_train": x[:5], "x_test": x[5:], "y_train": np.arange(5), "y_test": np.arange(2)}


def test_npz(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    found = images(tmp_path / "a.npz")
    assert torch.equal(found.train[:, 0] * 255, torch.as_tensor(arrays["x_train"]).float())
    assert found.test_labels is not None and found.test_labels.tolist() == [0, 1]
    del arrays["y_train"]
    np.savez(tmp_path / "b.npz", **(arrays | {"x_train": arrays["x_train"] / 255.0}))
    again = images(str(tmp_path / "b.npz"))
    assert again.labels is None
    torch.testing.assert_close(again.train, found.train)


def test_the_four_files(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    for split, name in (("train", "train"), ("test", "t10k")):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"].astype(np.uint8)
        sizes = np.array([2051, *x.shape], ">i4").tobytes()
        path = tmp_path / f"{name}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(sizes + x.tobytes()))
        sizes = np.array([2049, len(y)], ">i4").tobytes()
        path = tmp_path / f"{name}-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(sizes + y.tobytes()))
    found = images(tmp_path)
    assert torch.equal((found.test * 255).byte()[:, 0], torch.as_tensor(arrays["x_test"]))
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels"):
        images(tmp_path)


def test_mnist_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn import datasets

    x = np.zeros((70000, 784), np.float32)
    x[60000] = 255
    bunch = SimpleNamespace(data=x, target=np.array(["3"] * 70000))
    monkeypatch.setattr(datasets, "fetch_openml", lambda name, as_frame: bunch)
    found = images("mnist")
    assert found.train.shape == (60000, 1, 28, 28) and float(found.test[0].min()) == 1.0

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets, "fetch_openml", offline)
    with pytest.raises(DataError, match=r"no network.*\.npz"):
        images("mnist")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros(3)}, "x_train"),
        ({"x_train": np.zeros((3, 4)), "x_test": np.zeros((3, 4))}, r"\(N, H, W\)"),
        ({"x_train": np.full((3, 4, 4), 2.0), "x_test": np.zeros((3, 4, 4))}, "0 to 1"),
    ],
)
def test_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        images(tmp_path / "a.npz")


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fashion-mnist or a path"):
        images("cifar")
    (tmp_path / "a.npz").write_text("no array")
    with pytest.raises(DataError, match=r"no \.npz"):
        images(tmp_path / "a.npz")


def test_binarized_draws_anew() -> None:
    x = torch.full((4000, 2), 0.3)
    data = Binarized(x)
    torch.manual_seed(0)
    one, two = (torch.stack([row for (row,) in data.__getitems__(list(range(4000)))]) for _ in "ab")
    assert set(one.unique().tolist()) == {0.0, 1.0}
    se = (0.3 * 0.7 / 8000) ** 0.5
    assert abs(float(one.mean()) - 0.3) < 4 * se
    both = float((one * two).mean())  # independent draws
    assert abs(both - 0.09) < 4 * (0.09 * 0.91 / 8000) ** 0.5
    assert torch.equal(data.fixed(1), data.fixed(1))
    assert data[0][0].shape == (2,)
    with pytest.raises(DataError, match="divide by 255"):
        Binarized(x * 255)


def test_binarized_in_a_fit() -> None:
    """The bound of grey pixels is that of their average binary image."""
    x = torch.rand(64, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    fits = []
    for _ in range(2):
        torch.manual_seed(0)
        vae = VAE(6, 2, hidden=(4,))
        vae.fit(Binarized(x), batch_size=16, epochs=3, seed=0, objective=pvi.IWAE(3))
        fits.append(vae.result())
    assert fits[0].history.losses == fits[1].history.losses
